"""The products of a GaLore step in INT8: operands quantised in registers or beforehand, to the codes of csrc/core/int8_gemm.h."""

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.apply import NEAREST
from lowrank_sys.kernels.common import ALPHA, DECAY, is_off
from lowrank_sys.kernels.epilogue import finish, finish_sum, write_weight
from lowrank_sys.kernels.int8 import INFINITY_BITS, LEAST_SCALE, aligned, inverse_of, magnitude
from lowrank_sys.reference import int8_gemm as reference

GROUP = tl.constexpr(reference.GROUP)
UNIT = tl.constexpr(1 / reference.CODES)
# Added to a number, it leaves the nearest integer in the low bits, ties to even, in two's complement.
ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def quantize(b_x, AXIS: tl.constexpr):
    """(codes, scales) of groups that lie along an axis of a tile; the scale of one that is not finite is NaN."""
    b_top = tl.max(magnitude(b_x), axis=AXIS, keep_dims=True)
    b_scale = b_top.to(tl.float32, bitcast=True) * UNIT
    b_scale = tl.where(b_top < INFINITY_BITS, tl.where(b_scale >= LEAST_SCALE, b_scale, 0.0), float("nan"))
    b_bits = (b_x * inverse_of(b_scale) + ROUND).to(tl.int32, bitcast=True)
    return b_bits.to(tl.int8), b_scale


@triton.jit
def quantize_kernel(x, codes, scale, channels, depth, groups, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """codes (channels, depth) int8 and scale (channels, groups) of x (depth, channels) if COLUMNS, else (channels, depth).

    A program owns one group of BLOCK_C channels; BLOCK_D is a group, or all of a shorter depth.

    Bytes: x once, codes and scales once.
    """
    i_c, i_g = tl.program_id(0), tl.program_id(1)
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_d = (i_g * GROUP + tl.arange(0, BLOCK_D)).to(tl.int64)
    m_c, m_d = o_c < channels, o_d < depth
    if COLUMNS:
        b_x = tl.trans(tl.load(x + o_d[:, None] * channels + o_c[None, :], mask=m_d[:, None] & m_c[None, :], other=0.0))
    else:
        b_x = tl.load(x + o_c[:, None] * depth + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0)
    b_codes, b_scale = quantize(b_x.to(tl.float32), 1)
    tl.store(codes + o_c[:, None] * depth + o_d[None, :], b_codes, mask=m_c[:, None] & m_d[None, :])
    tl.store(scale + o_c[:, None] * groups + i_g, b_scale, mask=m_c[:, None])


@triton.jit
def project_int8_kernel(
    grad,
    codes,
    scale,
    out,
    exp_avg,
    exp_avg_sq,
    scalars,
    partials,
    counters,
    m,
    n,
    r,
    splits,
    chunk,
    beta1,
    beta2,
    gain1,
    gain2,
    eps,
    LEFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`project_kernel` in INT8, for one matrix: codes (r, m or n) and scale (r, groups) are the basis quantised along its vectors.

    G is quantised in registers, a group of its depth at a time; `chunk` is a multiple of the group.

    Bytes: G once per tile of r, codes and scales once per tile of channels, R-sized tensors as `project_kernel`.
    """
    if scalars is not None:
        if is_off(scalars):
            return
    tiles_r = tl.cdiv(r, BLOCK_R)
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_r, i_c = i_tile % tiles_r, i_tile // tiles_r
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    depth = m if LEFT else n
    channels = n if LEFT else m
    groups = tl.cdiv(depth, GROUP)
    m_r, m_c = o_r < r, o_c < channels
    begin = i_split * chunk
    end = tl.minimum(begin + chunk, depth)

    b_r = tl.zeros([BLOCK_R if LEFT else BLOCK_C, BLOCK_C if LEFT else BLOCK_R], tl.float32)
    for i_d in range(begin, end, GROUP):
        o_d = (i_d + tl.arange(0, GROUP)).to(tl.int64)
        m_d = o_d < end
        b_codes = tl.load(codes + o_r[:, None] * depth + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0)
        b_scale = tl.load(scale + o_r * groups + i_d // GROUP, mask=m_r, other=0.0)
        if LEFT:
            b_g = tl.load(grad + o_d[:, None] * n + o_c[None, :], mask=m_d[:, None] & m_c[None, :], other=0.0)
            b_own, b_own_scale = quantize(b_g.to(tl.float32), 0)
            b_dot = tl.dot(b_codes, b_own, out_dtype=tl.int32)
            b_r += (b_scale[:, None] * b_own_scale) * b_dot.to(tl.float32)
        else:
            b_g = tl.load(grad + o_c[:, None] * n + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0)
            b_own, b_own_scale = quantize(b_g.to(tl.float32), 1)
            b_dot = tl.dot(b_own, tl.trans(b_codes), out_dtype=tl.int32)
            b_r += (b_own_scale * b_scale[None, :]) * b_dot.to(tl.float32)

    if LEFT:
        o_tile, m_tile = o_r[:, None] * n + o_c[None, :], m_r[:, None] & m_c[None, :]
    else:
        o_tile, m_tile = o_c[:, None] * r + o_r[None, :], m_c[:, None] & m_r[None, :]
    size = tl.full([], 1, tl.int64) * r * channels
    b_r, last = finish_sum(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile)
    if last:
        finish(b_r, out, exp_avg, exp_avg_sq, scalars, o_tile, m_tile, beta1, beta2, gain1, gain2, eps, LEFT)


@triton.jit(do_not_specialize=["seed", "parameter", "first"], do_not_specialize_on_alignment=["draw_step"])
def back_project_int8_gemm_kernel(
    param,
    rows,
    row_scale,
    columns,
    column_scale,
    scalars,
    draw_step,
    skipped,
    seed,
    parameter,
    first,
    m,
    n,
    r,
    groups,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """W <- decay W + alpha rows columnsᵀ in INT8: codes (m, r) and (n, r), scales (m, groups) and (n, groups).

    STEP as in `apply_kernel`, and draw_step its step of random bits; BLOCK_D divides a group.

    Bytes: W read once and written once; codes and scales of rows once per tile of columns, and the reverse.
    """
    if STEP:
        if is_off(scalars):
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    b_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_g in range(groups):
        b_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for i_d in range(i_g * GROUP, tl.minimum(r, (i_g + 1) * GROUP), BLOCK_D):
            o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
            m_d = o_d < r
            b_rows = tl.load(rows + o_m[:, None] * r + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0)
            b_columns = tl.load(columns + o_n[None, :] * r + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0)
            b_dot = tl.dot(b_rows, b_columns, b_dot, out_dtype=tl.int32)
        b_row_scale = tl.load(row_scale + o_m * groups + i_g, mask=m_m, other=0.0)
        b_column_scale = tl.load(column_scale + o_n * groups + i_g, mask=m_n, other=0.0)
        b_back += (b_row_scale[:, None] * b_column_scale[None, :]) * b_dot.to(tl.float32)
    write_weight(
        b_back,
        param,
        tl.load(scalars + ALPHA),
        tl.load(scalars + DECAY),
        skipped,
        i_m,
        i_n,
        m,
        n,
        seed,
        draw_step,
        parameter,
        first,
        STEP,
        ALIGNED,
        BLOCK_M,
        BLOCK_N,
    )


def quantized(x, *, columns):
    """codes (channels, depth) int8 and scales (channels, groups) of x, whose columns or rows are the channels."""
    depth, channels = x.shape if columns else x.shape[::-1]
    groups = configs.cdiv(depth, GROUP.value)
    codes = torch.empty((channels, depth), dtype=torch.int8, device=x.device)
    scale = torch.empty((channels, groups), dtype=torch.float32, device=x.device)
    if codes.numel():
        config = configs.quantize_int8(depth)
        quantize_kernel[configs.cdiv(channels, config["BLOCK_C"]), groups](
            x=x,
            codes=codes,
            scale=scale,
            channels=channels,
            depth=depth,
            groups=groups,
            COLUMNS=columns,
            **config,
            **configs.OPTIONS,
        )
    return codes, scale


def launch_project_int8(
    grad, basis, out, *, left, counters, exp_avg=None, exp_avg_sq=None, scalars=None, beta1=0.0, beta2=0.0, eps=0.0
):
    """out (fp32) <- R, or Adam's update from it if there are moments, for one matrix; scalars: its row."""
    if out.numel() == 0:
        return
    m, n = grad.shape
    r = basis.shape[1]
    codes, scale = quantized(basis, columns=True)
    plan = configs.plan_project_int8(m, n, r, left=left, dtype=grad.dtype, card=configs.target(grad.device))
    split = plan.splits > 1
    project_int8_kernel[plan.tiles, plan.splits](
        grad=grad,
        codes=codes,
        scale=scale,
        out=out,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        scalars=scalars,
        partials=torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=grad.device) if split else None,
        counters=counters if split else None,
        m=m,
        n=n,
        r=r,
        splits=plan.splits,
        chunk=plan.chunk,
        beta1=beta1,
        beta2=beta2,
        gain1=1 - beta1,
        gain2=1 - beta2,
        eps=eps,
        LEFT=left,
        **plan.config,
        **configs.OPTIONS,
    )


def launch_back_project_int8(param, low_rank, basis, scalars, *, left, step, skipped=None, drawn=NEAREST):
    """W <- scalars[DECAY] W + scalars[ALPHA] back(X) for one matrix; X (R's shape) in fp32, so that its codes are the oracle's.

    drawn: as in `launch_apply`.
    """
    if param.numel() == 0:
        return
    m, n = param.shape
    r = basis.shape[1]
    own, update = quantized(basis, columns=False), quantized(low_rank, columns=left)
    (rows, row_scale), (columns, column_scale) = (own, update) if left else (update, own)
    config = configs.BACK_PROJECT_INT8_GEMM
    back_project_int8_gemm_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]),](
        param=param,
        rows=rows,
        row_scale=row_scale,
        columns=columns,
        column_scale=column_scale,
        scalars=scalars,
        draw_step=drawn.step,
        skipped=skipped,
        seed=drawn.seed,
        parameter=drawn.parameter,
        first=drawn.offset,
        m=m,
        n=n,
        r=r,
        groups=row_scale.shape[1],
        STEP=step,
        ALIGNED=drawn.step is not None and aligned(n, drawn.offset),
        **config,
        **configs.OPTIONS,
    )
