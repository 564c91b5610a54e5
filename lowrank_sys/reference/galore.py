"""The products of a low-rank step (GaLore, Zhao et al. 2024, Algorithm 2), and the norms of channels."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator
from lowrank_sys.reference.int8_gemm import int8_gemm as product_of_codes


def project(grad, basis, *, left, int8_gemm=False):
    """R = Bᵀ G (r, n) if left, else G B (m, r); fp32. grad (m, n), basis (m or n, r): fp32 | bf16 | fp16.

    int8_gemm quantises both on the fly and multiplies codes (lowrank_sys.reference.int8_gemm).
    """
    if grad.dtype != torch.float64:
        _ops.projection.check_project(grad, basis, left=left)
    g, b = grad.to(accumulator(grad)), basis.to(accumulator(grad))
    if int8_gemm:
        return product_of_codes(b.T, g.T, g.dtype) if left else product_of_codes(g, b.T, g.dtype)
    return b.T @ g if left else g @ b


def back(low_rank, basis, left, int8_gemm=False):
    """B X (m, n) if left, else X Bᵀ."""
    b = basis.to(low_rank.dtype)
    if int8_gemm:
        return product_of_codes(b, low_rank.T, b.dtype) if left else product_of_codes(low_rank, b, b.dtype)
    return b @ low_rank if left else low_rank @ b.T


def back_project_(param, low_rank, basis, *, alpha=1.0, beta=1.0, left, int8_gemm=False):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X of R's shape, fp32.

    beta = 0 does not read W, as in BLAS. int8_gemm as in `project`.
    """
    if param.dtype != torch.float64:
        _ops.projection.check_back_project(param, low_rank, basis, left=left)
    kept = beta * param.to(low_rank.dtype) if beta != 0 else 0
    param.copy_(kept + alpha * back(low_rank, basis, left, int8_gemm))


def channel_norms(grad, *, left):
    """2-norm of every channel of G (m, n): (n,) if left, else (m,); fp32."""
    if grad.dtype != torch.float64:
        _ops.projection.check_channel_norms(grad)
    return torch.linalg.vector_norm(grad.to(accumulator(grad)), dim=0 if left else 1)
