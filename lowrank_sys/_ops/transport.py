"""Carrying moments into a new basis."""

import torch

from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_float, expect_like, fake

SCHEMAS = {
    # M <- C M and V <- (C∘C) V, C = newᵀ old (right: times Cᵀ)
    "rotate_moments_": "(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor old, Tensor new, *, bool left) -> ()"
}


def check_rotate_moments(exp_avg, exp_avg_sq, old, new, *, left, op="rotate_moments_"):
    expect(exp_avg.dim() == 2, op, lambda: f"exp_avg must be a matrix, got shape {tuple(exp_avg.shape)}")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        expect_like(op, name, moment, exp_avg.shape, exp_avg.device)
        expect_dtype(op, name, moment, torch.float32)
    rank = exp_avg.shape[0 if left else 1]
    expect(
        old.dim() == 2 and old.shape[1] == rank,
        op,
        lambda: f"old must have shape (d, r = {rank}) for left={left}, got {tuple(old.shape)}",
    )
    for name, basis in (("old", old), ("new", new)):
        expect_float(op, name, basis)
        expect_like(op, name, basis, old.shape, exp_avg.device)


define(SCHEMAS)


@fake("rotate_moments_")
def _(exp_avg, exp_avg_sq, old, new, *, left):
    check_rotate_moments(exp_avg, exp_avg_sq, old, new, left=left)
