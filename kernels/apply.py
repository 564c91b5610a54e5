"""The writing half of a step: W <- decay W + alpha (back(X) + phi), a GEMM whose epilogue is the weight's store."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.basis import arguments, load_int4, rank
from lowrank_sys.kernels.common import (
    ALPHA,
    CORRECTION1,
    CORRECTION2,
    DECAY,
    GRAD_SCALE,
    SLOTS,
    dot,
    is_off,
    one_each,
    pick,
    precision,
)
from lowrank_sys.kernels.epilogue import count_left_out, write_weight
from lowrank_sys.kernels.int8 import aligned, update_int8

# What is added to back(X): nothing, the scaled residual, the residual's sign.
NONE, SCALED, SIGNED = (tl.constexpr(i) for i in range(3))
NO_BASIS = {"basis": None, "scale": None, "offset": None, "width": 0, "GROUP": 0}


class Drawn(NamedTuple):
    """The numbers of a weight's random bits, `step` (int64) on the device, and what an INT8 one is beside its codes."""

    scale: torch.Tensor | None = None
    step: torch.Tensor | None = None
    seed: int = 0
    parameter: int = 0
    offset: int = 0
    group_size: int = 0


NEAREST = Drawn()


@triton.jit
def back_tile(
    low_rank,
    low_rank_grad,
    basis,
    scale,
    offset,
    b_c,
    gain,
    i_m,
    i_n,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    PHI: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tile (i_m, i_n) of back(X) and, if APART, of back(R); else zeros, and if SCALED of back(gain X - c R) first. Both in fp32.

    back(X) = B X if LEFT, else X Bᵀ; the products share the tile of B. Finite, but not always 0, outside of the matrix.
    """
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    stride = tl.full([], BLOCK_R, tl.int64)
    if LEFT:
        o_basis = o_m[:, None] * r + o_r[None, :]
        o_x, step_x = o_r[:, None] * n + o_n[None, :], stride * n
    else:
        o_basis = o_n[None, :] * r + o_r[:, None]
        o_x, step_x = o_m[:, None] * r + o_r[None, :], stride

    b_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_inside = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        if LEFT:
            m_basis, m_x = m_m[:, None] & m_r[None, :], m_r[:, None] & m_n[None, :]
        else:
            m_basis, m_x = m_r[:, None] & m_n[None, :], m_m[:, None] & m_r[None, :]
        if not GROUP:
            b_basis = tl.load(basis + o_basis, mask=m_basis, other=0.0)
        elif LEFT:
            b_basis = tl.trans(load_int4(basis, scale, offset, i_r + o_r, i_m * BLOCK_M, m, r, width, GROUP, BLOCK_R, BLOCK_M))
        else:
            b_basis = load_int4(basis, scale, offset, i_r + o_r, i_n * BLOCK_N, n, r, width, GROUP, BLOCK_R, BLOCK_N)
        b_x = tl.load(low_rank + o_x, mask=m_x, other=0.0)
        if PHI == SCALED and not APART:
            b_x = gain * b_x - b_c * tl.load(low_rank_grad + o_x, mask=m_x, other=0.0)
        if PHI != NONE:
            b_x = b_x.to(b_basis.dtype)  # a 16-bit operand keeps the product on the 16-bit tensor cores
        b_back = dot(b_basis, b_x, b_back, PRECISION) if LEFT else dot(b_x, b_basis, b_back, PRECISION)
        if APART:
            b_r = tl.load(low_rank_grad + o_x, mask=m_x, other=0.0)
            b_inside = dot(b_basis, b_r, b_inside, PRECISION) if LEFT else dot(b_r, b_basis, b_inside, PRECISION)
        o_basis += BLOCK_R
        o_x += step_x
    return b_back, b_inside


@triton.jit(do_not_specialize=["seed", "parameter", "first"], do_not_specialize_on_alignment=["step"])
def apply_kernel(
    weight,
    weight_scale,
    grad,
    low_rank,
    low_rank_grad,
    basis,
    scale,
    offset,
    coefficients,
    scalars,
    step,
    skipped,
    seed,
    parameter,
    first,
    m,
    n,
    r,
    width,
    gain,
    residual_scale,
    LEFT: tl.constexpr,
    PHI: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    INT8_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W <- decay * W + alpha * update, in place; AdamW's decay comes before the update.

    update, with c the channel's coefficient, or residual_scale * grad_scale where there are no coefficients:
    - NONE: back(X). GaLore (Zhao et al. 2024, Algorithm 2).
    - SCALED: c G (APOLLO, without X), or back(gain X) + c (G - k back(R)) by one product: k = gain with coefficients (Fira), else
      1 (FRUGAL with plain SGD). With coefficients, alpha is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t).
    - SIGNED: gain back(X) + residual_scale * sign(grad_scale (G - back(R))). FRUGAL: two products, R in fp32.

    In a STEP an element whose update is not finite keeps its bytes (X or c is NaN in a channel that is left out) and is counted
    in `skipped`; the whole launch may be switched off. With scale and offset, the basis is in INT4, see `load_int4`; `width` bytes
    hold a vector. With a step (int64, on the device) the weight is rounded stochastically, in 16 bits, or, with an INT8_GROUP, as
    codes with their scales, see `update_int8`; `first` is the index of element (0, 0) in the unsharded tensor.
    A launch serves several matrices of one shape, where all are floats, to nearest, and NONE is added, else one: weight, low_rank
    and what the basis is made of are tuples, scalars has a row a matrix.

    Bytes: W read once and written once, G once; X and R once per tile of rows if LEFT (else of columns), B once per tile of the
    other axis, coefficients once per tile.
    """
    # Two operands of the widest groups leave no shared memory on a small card.
    APART: tl.constexpr = PHI == SIGNED or (PHI == SCALED and INT8_GROUP >= 1024)
    i_matrix = tl.program_id(1)
    weight = pick(weight, i_matrix)
    if low_rank is not None:
        low_rank, basis = pick(low_rank, i_matrix), pick(basis, i_matrix)
    if GROUP:
        scale, offset = pick(scale, i_matrix), pick(offset, i_matrix)
    scalars += i_matrix * SLOTS
    if STEP:
        if is_off(scalars):
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_c = None
    b_inner = None
    if coefficients is not None:
        if LEFT:
            b_c = tl.load(coefficients + o_n, mask=o_n < n, other=0.0)[None, :]
        else:
            b_c = tl.load(coefficients + o_m, mask=o_m < m, other=0.0)[:, None]
        b_inner = gain * b_c
    elif PHI == SCALED:
        b_c = tl.full([1, 1], 1.0, tl.float32) * (residual_scale * tl.load(scalars + GRAD_SCALE))
        b_inner = b_c

    b_update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_inside = b_update
    if low_rank is not None:
        b_update, b_inside = back_tile(
            low_rank,
            low_rank_grad,
            basis,
            scale,
            offset,
            b_inner,
            gain,
            i_m,
            i_n,
            m,
            n,
            r,
            width,
            LEFT,
            PHI,
            APART,
            PRECISION,
            GROUP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    m_w = (o_m < m)[:, None] & (o_n < n)[None, :]
    if PHI != NONE:
        b_g = tl.load(grad + o_m[:, None] * n + o_n[None, :], mask=m_w, other=0.0).to(tl.float32)
        if PHI == SCALED:
            if APART:
                b_update = gain * b_update - b_inner * b_inside
            b_update += b_c * b_g
        else:
            b_left = (b_g - b_inside) * tl.load(scalars + GRAD_SCALE)
            b_update = gain * b_update + residual_scale * ((b_left > 0).to(tl.float32) - (b_left < 0).to(tl.float32))
    alpha, decay = tl.load(scalars + ALPHA), tl.load(scalars + DECAY)
    if coefficients is not None:
        alpha = alpha * (tl.sqrt_rn(tl.load(scalars + CORRECTION2)) / tl.load(scalars + CORRECTION1))
    if not INT8_GROUP:
        write_weight(
            b_update, weight, alpha, decay, skipped, i_m, i_n, m, n, seed, step, parameter, first, STEP, ALIGNED, BLOCK_M, BLOCK_N
        )
    else:
        update_int8(
            b_update,
            weight,
            weight_scale,
            i_m,
            i_n,
            m,
            n,
            alpha,
            decay,
            seed,
            tl.load(step),
            parameter,
            first,
            INT8_GROUP,
            ALIGNED,
            BLOCK_M,
            BLOCK_N,
        )
        count_left_out(skipped, b_update, m_w)


def launch_apply(
    weights,
    scalars,
    *,
    left,
    low_ranks=None,
    bases=None,
    phi=NONE,
    grad=None,
    low_rank_grad=None,
    coefficients=None,
    gain=1.0,
    residual_scale=1.0,
    is_step=True,
    skipped=None,
    drawn=NEAREST,
):
    """W <- scalars[DECAY] W + scalars[ALPHA] update, for matrices of one shape and one set of dtypes; see `apply_kernel`.

    weights: (m, n), fp32 | bf16 | fp16, or the codes of one with the rest in `drawn`; low_ranks: X, R's shape, fp32 or the bases'
    type; bases: matrices, or each an `Int4Basis`; low_rank_grad: R, fp32; scalars: a row a matrix.
    """
    weight = weights[0]
    if weight.numel() == 0:
        return
    m, n = weight.shape
    r, dtypes, basis = 0, (), NO_BASIS
    if low_ranks is not None:
        r, dtypes, basis = rank(bases[0]), (low_ranks[0].dtype, bases[0].dtype), arguments(bases)
    config = configs.apply(
        configs.target(weight.device).arch,
        products=0 if low_ranks is None else 1 + (phi.value == SIGNED.value),
        residual=phi.value != NONE.value,
        n=n,
        r=r,
        dtypes=(*dtypes, weight.dtype),
        group_size=drawn.group_size,
        offset=drawn.offset,
    )
    apply_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]), len(weights)](
        weight=one_each(weights),
        weight_scale=drawn.scale,
        grad=grad,
        low_rank=None if low_ranks is None else one_each(low_ranks),
        low_rank_grad=low_rank_grad,
        **basis,
        coefficients=coefficients,
        scalars=scalars,
        step=drawn.step,
        skipped=skipped,
        seed=drawn.seed,
        parameter=drawn.parameter,
        first=drawn.offset,
        m=m,
        n=n,
        r=r,
        gain=gain,
        residual_scale=residual_scale,
        LEFT=left,
        PHI=phi.value,
        STEP=is_step,
        PRECISION=precision(),
        INT8_GROUP=drawn.group_size,
        ALIGNED=drawn.step is not None and aligned(n, drawn.offset),
        **config,
        **configs.OPTIONS,
    )
