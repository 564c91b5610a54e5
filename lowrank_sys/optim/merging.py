"""Merging the low-rank part of a quantized weight into its codes (LoQT, Loeschcke et al. 2024, section 3.3)."""

import torch

from lowrank_sys.nn.low_rank_part import put_part
from lowrank_sys.nn.quant_weight import buffers_of, decoded, low_rank_part
from lowrank_sys.subspace.basis import axis_of, store_of


def merge(param, state, iterations):
    """Give a weight a part on the basis of `state`, merging the one that it has."""
    m, n = param.shape
    left, store = state["left"], store_of(state)
    basis = store.load(state, axis_of(param.shape, state)).float()
    factor = basis.new_zeros((basis.shape[1], n) if left else (m, basis.shape[1]))
    if low_rank_part(param) is not None:
        weight = decoded(param)
        codes, scale, factor = nearest(weight, param.coding, param.group_size, basis, left, factor, iterations)
        param.codes.copy_(codes)
        param.scale.copy_(scale)
    put_part(buffers_of(param), factor, state)


def nearest(weight, coding, group_size, basis, left, factor, iterations):
    """(codes, scale, factor) whose values and back(factor) are near a weight (m, n) fp32; `factor` is what it begins as."""
    inverse = torch.linalg.pinv(basis.T @ basis, hermitian=True)
    kept = (*coding.encode(weight, group_size), factor)
    least = torch.full((), torch.inf, device=weight.device)
    for _ in range(iterations):
        made = coding.encode(weight - _back(factor, basis, left), group_size)
        error = weight - coding.decode(*made, weight.shape[1], group_size, torch.float32)
        factor = inverse @ (basis.T @ error) if left else (error @ basis) @ inverse
        size = torch.linalg.vector_norm(error.sub_(_back(factor, basis, left)))
        kept = [torch.where(size < least, new, old) for new, old in zip((*made, factor), kept)]
        least = torch.minimum(size, least)
    return kept


def _back(factor, basis, left):
    return basis @ factor if left else factor @ basis.T
