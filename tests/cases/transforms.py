"""Moments in a new basis, DCT columns, and orthogonalized updates."""

import torch

from cases.bounds import UNIT, Near, assert_within, exact, product
from cases.case import Case, same_bits
from cases.draw import FLOATS
from cases.projection import low_rank
from lowrank_sys.subspace import dct


def rotate_arguments(draw):
    d, n, r, left = draw.size(0), draw.size(), draw.size(1, 65), draw.of(True, False)
    shape = low_rank(n, n, r, left)
    old = draw.values(d, r, dtype=draw.of(*FLOATS), hostile=False)
    return dict(
        exp_avg=draw.values(*shape, hostile=False),
        exp_avg_sq=draw.values(*shape, hostile=False).abs(),
        old=old,
        new=draw.of(draw.values(d, r, dtype=draw.of(*FLOATS), hostile=False), old.clone()),
        left=left,
    )


def compare_rotate(before, after, result):
    left, names = before["left"], ("exp_avg", "exp_avg_sq")
    if torch.equal(before["old"].float(), before["new"].float()):
        assert all(torch.equal(before[name], after[name]) for name in names)
        return
    c = product(exact(before["new"].T), exact(before["old"]))
    squares = Near(c.value.square(), 2 * c.value.abs() * c.error + c.error.square() + 2 * UNIT * c.value.square())
    for name, factor in zip(names, (c, squares)):
        moment = exact(before[name])
        turned = Near(factor.value.T, factor.error.T)
        assert_within(name, after[name], product(factor, moment) if left else product(moment, turned))
    assert (after["exp_avg_sq"] >= 0).all()


def select_arguments(draw):
    left = draw.of(True, False)
    m, n = draw.size(1 if left else 0), draw.size(0 if left else 1)
    d = m if left else n
    return dict(
        grad=draw.values(m, n, dtype=draw.of(*FLOATS), hostile=False),
        rank=draw.of(1, d, (d + 1) // 2),
        left=left,
        norm=draw.of(1, 2),
    )


def compare_select(before, after, result):
    left, grad = before["left"], before["grad"].double()
    d = grad.shape[0 if left else 1]
    basis = dct.dct_columns(torch.arange(d, dtype=torch.int32), d=d).double()
    s = basis.T @ grad if left else grad @ basis
    want = torch.linalg.vector_norm(s, before["norm"], dim=1 if left else 0)
    indices, norms = result
    assert (indices[1:] > indices[:-1]).all() and indices.dtype == torch.int32 and len(indices) == before["rank"]
    # An FFT is off by a few roundings of the norm of each channel.
    error = 32 * UNIT * torch.linalg.vector_norm(grad, dim=0 if left else 1).sum()
    assert_within("norms", norms, Near(want[indices.long()], error.expand(len(indices))))
    rest = torch.ones(d, dtype=torch.bool)
    rest[indices.long()] = False
    assert not rest.any() or want[rest].max() <= want[indices.long()].min() + 2 * error


def columns_arguments(draw):
    d = draw.size(1)
    r = draw.of(1, 0, d)
    return dict(indices=torch.randperm(d, generator=torch.Generator().manual_seed(draw.integer(0, 9)))[:r].int(), d=d)


def compare_columns(before, after, result):
    d, k = before["d"], before["indices"].double()
    i = torch.arange(d, dtype=torch.float64)[:, None]
    want = torch.cos(torch.pi * (2 * i + 1) * k / (2 * d)) * ((2 - (k == 0).double()) / d).sqrt()
    assert_within("columns", result, Near(want, torch.full_like(want, 1e-12)))


STEPS = (5, 0, 1)
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize_arguments(draw):
    return dict(x=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), steps=draw.of(*STEPS), a=A, b=B, c=C)


def compare_orthogonalize(before, after, result):
    x = before["x"].double()
    assert result.shape == x.shape and result.dtype == torch.float32
    if not x.isfinite().all() or not x.any():
        assert same_bits(result, torch.zeros(x.shape)) or not result.any()
        return
    x = x / x.norm()
    for _ in range(before["steps"]):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    # Each step may amplify what is off by A, and adds a rounding for each root of its depth.
    error = A ** before["steps"] * 8 * UNIT * max(x.shape) ** 0.5
    assert_within("result", result, Near(x, torch.full_like(x, error)))


CASES = {
    "rotate_moments_": Case(rotate_arguments, compare_rotate),
    "dct_select": Case(select_arguments, compare_select),
    "dct_columns": Case(columns_arguments, compare_columns),
    "newton_schulz": Case(orthogonalize_arguments, compare_orthogonalize),
}
