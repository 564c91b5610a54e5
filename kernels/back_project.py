"""W <- decay W + alpha back(X): a GEMM with the weight update as its epilogue."""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.basis import Int4Basis, arguments, load_int4, rank
from lowrank_sys.kernels.common import DECAY, SLOTS, dot, is_off, on_device_of, pick, precision
from lowrank_sys.kernels.epilogue import write_weight
from lowrank_sys.kernels.int8_gemm import launch_back_project_int8


@triton.jit
def back_tile(
    low_rank,
    basis,
    scale,
    offset,
    i_m,
    i_n,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tile (i_m, i_n) of B X if LEFT, else of X Bᵀ, in fp32; finite, but not always 0, outside of the matrix."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    stride = tl.full([], BLOCK_R, tl.int64)
    if LEFT:
        p_a = basis + o_m[:, None] * r + o_r[None, :]
        p_b, step_b = low_rank + o_r[:, None] * n + o_n[None, :], stride * n
    else:
        p_a = low_rank + o_m[:, None] * r + o_r[None, :]
        p_b, step_b = basis + o_n[None, :] * r + o_r[:, None], stride

    b_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        if not GROUP:
            b_a = tl.load(p_a, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
        elif LEFT:
            b_a = tl.trans(load_int4(basis, scale, offset, i_r + o_r, i_m * BLOCK_M, m, r, width, GROUP, BLOCK_R, BLOCK_M))
            b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)
        else:
            b_a = tl.load(p_a, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_b = load_int4(basis, scale, offset, i_r + o_r, i_n * BLOCK_N, n, r, width, GROUP, BLOCK_R, BLOCK_N)
        b_back = dot(b_a, b_b, b_back, PRECISION)
        p_a += BLOCK_R
        p_b += step_b
    return b_back


@triton.jit
def back_project_kernel(
    param,
    low_rank,
    basis,
    scale,
    offset,
    scalars,
    skipped,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W <- decay * W + alpha * (B X if LEFT, else X Bᵀ), in place.

    GaLore (Zhao et al. 2024, Algorithm 2), with AdamW's decay before the update. In a STEP an element whose product is not
    finite keeps its bytes (X is NaN in a skipped channel) and is counted in `skipped`; the whole launch may be switched off.
    With scale and offset, the basis is in INT4, see `load_int4`; `width` bytes hold a vector.
    A launch serves several matrices of one shape: param, low_rank and what the basis is made of are tuples, scalars has a row
    a matrix.

    Bytes: W read once and written once; X once per tile of rows if LEFT (else of columns), B once per tile of the other axis.
    """
    i_matrix = tl.program_id(1)
    param, low_rank, basis = pick(param, i_matrix), pick(low_rank, i_matrix), pick(basis, i_matrix)
    if GROUP:
        scale, offset = pick(scale, i_matrix), pick(offset, i_matrix)
    scalars += i_matrix * SLOTS
    if STEP:
        if is_off(scalars):
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    b_back = back_tile(low_rank, basis, scale, offset, i_m, i_n, m, n, r, width, LEFT, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_R)

    write_weight(b_back, param, scalars, skipped, i_m, i_n, m, n, STEP, BLOCK_M, BLOCK_N)


def launch_back_project(params, low_ranks, bases, scalars, *, left, step, skipped=None):
    """W <- scalars[DECAY] W + scalars[ALPHA] back(X), for matrices of one shape and one set of dtypes.

    low_ranks: R's shape, fp32 or the bases' type; bases: matrices, or each an `Int4Basis`; scalars: a row a matrix.
    """
    param, low_rank, basis = params[0], low_ranks[0], bases[0]
    if param.numel() == 0:
        return
    m, n = param.shape
    r = rank(basis)
    config = configs.config_for(
        configs.target(param.device).arch, "back_project", n=n, r=r, dtypes=(low_rank.dtype, basis.dtype, param.dtype)
    )
    back_project_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]), len(params)](
        param=tuple(params),
        low_rank=tuple(low_ranks),
        **arguments(bases),
        scalars=scalars,
        skipped=skipped,
        m=m,
        n=n,
        r=r,
        LEFT=left,
        STEP=step,
        PRECISION=precision(),
        **config,
        **configs.OPTIONS,
    )


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
        scalars = torch.full((SLOTS.value,), alpha, dtype=torch.float32, device=param.device)
        scalars[DECAY.value].fill_(beta)
        if int8_gemm:
            launch_back_project_int8(param, low_rank, basis, scalars, left=left, step=False)
        else:
            launch_back_project([param], [low_rank], [basis], scalars, left=left, step=False)
