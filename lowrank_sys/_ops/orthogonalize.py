"""Orthogonalizing an update (Muon)."""

import torch

from lowrank_sys._ops.rules import define, expect, expect_matrix, fake

SCHEMAS = {"newton_schulz": "(Tensor x, *, int steps=5, float a=3.4445, float b=-4.7750, float c=2.0315) -> Tensor"}


def check_newton_schulz(x, *, steps, op="newton_schulz"):
    expect_matrix(op, "x", x)
    expect(steps >= 0, op, lambda: f"steps must be at least 0, got {steps}")


define(SCHEMAS)


@fake("newton_schulz")
def _(x, *, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    check_newton_schulz(x, steps=steps)
    return x.new_empty(x.shape, dtype=torch.float32)
