"""The linear layer on an INT8 or NF4 weight, forward and backward: a GEMM that dequantizes in registers."""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import dot, on_device_of, precision, store
from lowrank_sys.kernels.epilogue import store_part, sum_parts
from lowrank_sys.kernels.project import counters_of

L0, L1, L2, L3, L4, L5, L6, L7, L8, L9, L10, L11, L12, L13, L14, L15 = map(tl.constexpr, _ops.nf4.LEVELS)
TOGETHER = tl.constexpr(8)  # tiles of rows whose programs are neighbours


@triton.jit
def int8_linear_kernel(
    rows,
    codes,
    scale,
    bias,
    out,
    partials,
    counters,
    t,
    m,
    n,
    splits,
    chunk,
    BACK: tl.constexpr,
    NF4: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (t, m) = x Wᵀ + bias from rows = x (t, n), or if BACK out (t, n) = dy W from rows = dy (t, m); W = scale * codes,
    or if NF4 scale * levels of packed codes.

    A program makes a tile of outᵀ = W xᵀ (BACK: Wᵀ dyᵀ) over one of `splits` parts of the summed axis: the operand that is
    dequantized is the left one, which tensor cores take from registers. W (m, n) is dequantized in fp32 and rounded to the
    rows' type for the product. A tile never holds two groups along n: BLOCK_D <= GROUP, or BLOCK_O <= GROUP if BACK. With
    partials, the last program to reach a tile adds its parts in order and finishes it, so results do not depend on timing.

    Bytes: rows once per tile of outputs, codes (half a byte each if NF4) once per tile of rows, scales once per tile of W,
    partials 2 * splits times, out once.
    """
    outputs, depth = (n, m) if BACK else (m, n)
    groups = tl.cdiv(n, GROUP)
    tiles_t, tiles_o = tl.cdiv(t, BLOCK_T), tl.cdiv(outputs, BLOCK_O)
    # Neighbours share codes, and programs of one wave few tiles of either operand, so that second reads hit the L2 cache.
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_t, i_o = tl.swizzle2d(i_tile // tiles_o, i_tile % tiles_o, tiles_t, tiles_o, TOGETHER)
    o_t = (i_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_o = (i_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    begin = i_split * chunk
    end = tl.minimum(begin + chunk, depth)
    o_d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
    m_t, m_o = o_t < t, o_o < outputs
    stride = tl.full([], BLOCK_D, tl.int64)
    p_rows = rows + o_t[None, :] * depth + o_d[:, None]
    if BACK:
        o_row, p_codes, step = o_d, codes + o_d[None, :] * n + o_o[:, None], stride * n
        p_scale = scale + o_d * groups + i_o * BLOCK_O // GROUP
    else:
        o_row, p_codes, step = o_o, codes + o_o[:, None] * n + o_d[None, :], stride
        p_scale = scale + o_o * groups

    b_out = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for i_d in range(begin, end, BLOCK_D):
        m_d = i_d + tl.arange(0, BLOCK_D) < end
        b_rows = tl.load(p_rows, mask=m_d[:, None] & m_t[None, :], other=0.0)
        if NF4 and BACK:
            b_codes = tl.trans(load_nf4(codes, o_row, i_o * BLOCK_O, m_d, n, BLOCK_O))
            o_row += BLOCK_D
        elif NF4:
            b_codes = load_nf4(codes, o_row, i_d, m_o, n, BLOCK_D)
        else:
            b_codes = tl.load(p_codes, mask=m_o[:, None] & m_d[None, :], other=0).to(tl.float32)
        if BACK:
            b_w = b_codes * tl.load(p_scale, mask=m_d, other=0.0)[None, :]
            p_scale += stride * groups
        else:
            b_w = b_codes * tl.load(p_scale + i_d // GROUP, mask=m_o, other=0.0)[:, None]
        b_out = dot(b_w.to(b_rows.dtype), b_rows, b_out, PRECISION)
        p_rows += BLOCK_D
        p_codes += step

    if partials is None:
        write(b_out, bias, out, o_t, o_o, t, outputs)
    else:
        size = tl.full([], 1, tl.int64) * t * outputs
        o_tile, m_tile = o_t[None, :] * outputs + o_o[:, None], m_o[:, None] & m_t[None, :]
        if store_part(b_out, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile):
            # Few rows at a time, for a small share of the registers.
            for first in range(i_t * BLOCK_T, i_t * BLOCK_T + BLOCK_T, 16):
                o_few = (first + tl.arange(0, 16)).to(tl.int64)
                o_part, m_part = o_few[None, :] * outputs + o_o[:, None], m_o[:, None] & (o_few < t)[None, :]
                write(sum_parts(partials, splits, size, o_part, m_part), bias, out, o_few, o_o, t, outputs)


@triton.jit
def load_nf4(packed, o_row, first, m_row, n, BLOCK: tl.constexpr):
    """Levels of elements first ... first + BLOCK - 1 of the rows o_row, (rows, BLOCK) in fp32; `first` is even.

    What lies outside of the matrix is finite. Bytes: half a byte an element.
    """
    width = (n + 1) // 2
    o_byte = (first // 2 + tl.arange(0, BLOCK // 2)).to(tl.int64)
    mask = m_row[:, None] & (o_byte < width)[None, :]
    b_packed = tl.load(packed + o_row[:, None] * width + o_byte[None, :], mask=mask, other=0)
    return tl.interleave(level(b_packed >> 4), level(b_packed & 15))


@triton.jit
def level(b_code):
    """LEVELS[code], by selections: a table would be read from memory."""
    b_a, b_b, b_c, b_d = (b_code & 1) != 0, (b_code & 2) != 0, (b_code & 4) != 0, (b_code & 8) != 0
    b_0 = tl.where(b_b, tl.where(b_a, L3, L2), tl.where(b_a, L1, L0))
    b_1 = tl.where(b_b, tl.where(b_a, L7, L6), tl.where(b_a, L5, L4))
    b_2 = tl.where(b_b, tl.where(b_a, L11, L10), tl.where(b_a, L9, L8))
    b_3 = tl.where(b_b, tl.where(b_a, L15, L14), tl.where(b_a, L13, L12))
    return tl.where(b_d, tl.where(b_c, b_3, b_2), tl.where(b_c, b_1, b_0))


@triton.jit
def write(b_out, bias, out, o_t, o_o, t, outputs):
    """Store a tile of outᵀ, with the bias."""
    m_o = o_o < outputs
    if bias is not None:
        b_out += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[:, None]
    store(out + o_t[None, :] * outputs + o_o[:, None], b_out, m_o[:, None] & (o_t < t)[None, :])


def launch(rows, codes, scale, bias, *, n, back, group_size, nf4=False):
    """x (..., n) -> y (..., m), or dy (..., m) -> dx (..., n) if `back`."""
    m = codes.shape[0]
    outputs = n if back else m
    out = torch.empty((*rows.shape[:-1], outputs), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    t = out.numel() // outputs
    kind = {"back": back, "dtype": rows.dtype, "group_size": group_size, "nf4": nf4}
    plan = configs.plan_int8_linear(t, m, n, card=configs.target(rows.device), **kind)
    split = plan.splits > 1
    with on_device_of(rows):
        int8_linear_kernel[plan.tiles, plan.splits](
            rows=rows,
            codes=codes,
            scale=scale,
            bias=bias,
            out=out,
            partials=torch.empty((plan.splits, t, outputs), dtype=torch.float32, device=rows.device) if split else None,
            counters=counters_of(rows.device) if split else None,
            t=t,
            m=m,
            n=n,
            splits=plan.splits,
            chunk=plan.chunk,
            BACK=back,
            NF4=nf4,
            GROUP=group_size,
            PRECISION=precision(),
            **plan.config,
            **configs.OPTIONS,
        )
    return out


def int8_linear(x, codes, scale, bias=None, *, group_size=256):
    """y = x Wᵀ + bias (..., m) in x's type; x (..., n) and bias (m) fp32 | bf16 | fp16."""
    _ops.int8.check_int8_linear(x, codes, scale, bias, group_size=group_size)
    return launch(x, codes, scale, bias, n=codes.shape[1], back=False, group_size=group_size)


def int8_linear_backward(grad_out, codes, scale, *, group_size=256):
    """dx = dy W (..., n) in dy's type; grad_out dy (..., m)."""
    _ops.int8.check_int8_linear_backward(grad_out, codes, scale, group_size=group_size)
    return launch(grad_out, codes, scale, None, n=codes.shape[1], back=True, group_size=group_size)


def nf4_linear(x, packed, absmax, bias=None, *, group_size=64):
    """y = x Wᵀ + bias (..., m) in x's type; x (..., n) and bias (m) fp32 | bf16 | fp16."""
    _ops.nf4.check_nf4_linear(x, packed, absmax, bias, group_size=group_size)
    return launch(x, packed, absmax, bias, n=x.shape[-1], back=False, group_size=group_size, nf4=True)


def nf4_linear_backward(grad_out, packed, absmax, *, n, group_size=64):
    """dx = dy W (..., n) in dy's type; grad_out dy (..., m)."""
    _ops.nf4.check_nf4_linear_backward(grad_out, packed, absmax, n=n, group_size=group_size)
    return launch(grad_out, packed, absmax, None, n=n, back=True, group_size=group_size, nf4=True)
