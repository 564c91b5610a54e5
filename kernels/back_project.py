"""W <- decay W + alpha back(X): the product alone, into any weight."""

import torch

from lowrank_sys import _ops
from lowrank_sys.kernels.apply import Drawn, launch_apply
from lowrank_sys.kernels.basis import Int4Basis
from lowrank_sys.kernels.common import ALPHA, DECAY, SLOTS, on_device_of
from lowrank_sys.kernels.int8_gemm import launch_back_project_int8
from lowrank_sys.kernels.scalars import as_scalar


def _scalars(alpha, decay, device):
    """The row of a launch that is no step. alpha and decay: numbers or 0-dim tensors."""
    scalars = torch.empty(SLOTS.value, dtype=torch.float32, device=device)
    for slot, value in ((ALPHA, alpha), (DECAY, decay)):
        scalars[slot.value].fill_(value)
    return scalars


def back_project_(param, low_rank, basis, *, alpha=1.0, beta=1.0, left, int8_gemm=False):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X of R's shape, fp32.

    beta = 0 does not depend on W, as in BLAS. int8_gemm quantises X and the basis on the fly, see lowrank_sys.kernels.int8_gemm.
    """
    _ops.projection.check_back_project(param, low_rank, basis, left=left)
    _back_project(param, low_rank, basis, alpha=alpha, beta=beta, left=left, int8_gemm=int8_gemm)


def back_project_int4_(param, low_rank, packed, scale, offset, *, alpha=1.0, beta=1.0, left, group_size=256):
    """back_project_ with a basis in INT4, see `quantize_int4`."""
    _ops.int4.check_back_project_int4(param, low_rank, packed, scale, offset, left=left, group_size=group_size)
    _back_project(param, low_rank, Int4Basis(packed, scale, offset, group_size), alpha=alpha, beta=beta, left=left)


def _back_project(param, low_rank, basis, *, alpha, beta, left, int8_gemm=False):
    with on_device_of(param):
        scalars = _scalars(alpha, beta, param.device)
        if int8_gemm:
            launch_back_project_int8(param, low_rank, basis, scalars, left=left, step=False)
        else:
            launch_apply([param], scalars, left=left, low_ranks=[low_rank], bases=[basis], is_step=False)


def counter_step(step):
    """A step (float64) of the random bits' counter, int64: the kernel takes their lowest 32 bits. Not finite, or huge: 0."""
    return torch.where(step.abs() < 2.0**62, step, 0.0).to(torch.int64)


def back_project_int8_(
    codes,
    scale,
    low_rank,
    basis,
    basis_scale=None,
    basis_offset=None,
    *,
    alpha=1.0,
    decay=1.0,
    left,
    seed,
    step,
    parameter,
    offset=0,
    group_size=256,
    basis_group_size=256,
):
    """W <- decay W + alpha back(X) for an INT8 weight (m, n), rounded stochastically; types and rules as the oracle's."""
    _ops.back_project_int8.check_back_project_int8(
        codes,
        scale,
        low_rank,
        basis,
        basis_scale,
        basis_offset,
        alpha=alpha,
        decay=decay,
        left=left,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )
    device = codes.device
    with on_device_of(codes):
        number = counter_step(as_scalar(step, device).double())
        launch_apply(
            [codes],
            _scalars(alpha, decay, device),
            left=left,
            low_ranks=[low_rank],
            bases=[basis if basis_scale is None else Int4Basis(basis, basis_scale, basis_offset, basis_group_size)],
            is_step=False,
            drawn=Drawn(scale, number, seed, parameter, offset, group_size),
        )
