"""Carrying moments into a new basis."""

import torch

from lowrank_sys import _ops


def rotation(old, new, dtype):
    """C = newᵀ old (r, r), exactly I where the two are equal: a basis that was kept leaves its moments as they are."""
    c = new.to(dtype).T @ old.to(dtype)
    same = (new.to(dtype) == old.to(dtype)).all()
    return torch.where(same, torch.eye(c.shape[0], dtype=dtype, device=c.device), c)


def rotate_moments_(exp_avg, exp_avg_sq, old, new, *, left):
    """Carry Adam's moments into a new basis, in place: M <- C M and V <- (C∘C) V with C = newᵀ old (right: times Cᵀ).

    V is then the variance of C R for a low-rank gradient R of uncorrelated entries, a sum of products that are not negative:
    no rounding makes it negative.

    exp_avg, exp_avg_sq: (r, n) if left, else (m, r), fp32. old, new: (m or n, r), fp32 | bf16 | fp16, orthonormal columns.
    """
    _ops.transport.check_rotate_moments(exp_avg, exp_avg_sq, old, new, left=left)
    rotate(exp_avg, exp_avg_sq, old, new, left=left)


def rotate(exp_avg, exp_avg_sq, old, new, *, left):
    """rotate_moments_ without its checks; moments in fp64 are rotated in fp64."""
    c = rotation(old, new, exp_avg.dtype)
    squares = c * c
    exp_avg.copy_(c @ exp_avg if left else exp_avg @ c.T)
    exp_avg_sq.copy_(squares @ exp_avg_sq if left else exp_avg_sq @ squares.T)
