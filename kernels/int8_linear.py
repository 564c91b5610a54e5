"""The linear layer on an INT8 weight, forward and backward: a GEMM that dequantizes in registers."""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import dot, on_device_of, precision, store
from lowrank_sys.kernels.epilogue import store_part, sum_parts
from lowrank_sys.kernels.project import counters_of

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
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (t, m) = x Wᵀ + bias from rows = x (t, n), or if BACK out (t, n) = dy W from rows = dy (t, m); W = scale * codes.

    A program makes a tile of outᵀ = W xᵀ (BACK: Wᵀ dyᵀ) over one of `splits` parts of the summed axis: the operand that is
    dequantized is the left one, which tensor cores take from registers. W (m, n) is dequantized in fp32 and rounded to the
    rows' type for the product. A tile never holds two groups along n: BLOCK_D <= GROUP, or BLOCK_O <= GROUP if BACK. With
    partials, the last program to reach a tile adds its parts in order and finishes it, so results do not depend on timing.

    Bytes: rows once per tile of outputs, codes once per tile of rows, scales once per tile of W, partials 2 * splits times,
    out once.
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
        p_codes, step = codes + o_d[None, :] * n + o_o[:, None], stride * n
        p_scale = scale + o_d * groups + i_o * BLOCK_O // GROUP
    else:
        p_codes, step = codes + o_o[:, None] * n + o_d[None, :], stride
        p_scale = scale + o_o * groups

    b_out = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for i_d in range(begin, end, BLOCK_D):
        m_d = i_d + tl.arange(0, BLOCK_D) < end
        b_rows = tl.load(p_rows, mask=m_d[:, None] & m_t[None, :], other=0.0)
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
def write(b_out, bias, out, o_t, o_o, t, outputs):
    """Store a tile of outᵀ, with the bias."""
    m_o = o_o < outputs
    if bias is not None:
        b_out += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[:, None]
    store(out + o_t[None, :] * outputs + o_o[:, None], b_out, m_o[:, None] & (o_t < t)[None, :])


def launch(rows, codes, scale, bias, *, back, group_size):
    """x (..., n) -> y (..., m), or dy (..., m) -> dx (..., n) if `back`."""
    m, n = codes.shape
    outputs = n if back else m
    out = torch.empty((*rows.shape[:-1], outputs), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    t = out.numel() // outputs
    plan = configs.plan_int8_linear(t, m, n, back=back, dtype=rows.dtype, group_size=group_size, card=configs.target(rows.device))
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
            GROUP=group_size,
            PRECISION=precision(),
            **plan.config,
            **configs.OPTIONS,
        )
    return out


def int8_linear(x, codes, scale, bias=None, *, group_size=256):
    """y = x Wᵀ + bias (..., m) in x's type; x (..., n) and bias (m) fp32 | bf16 | fp16."""
    _ops.int8.check_int8_linear(x, codes, scale, bias, group_size=group_size)
    return launch(x, codes, scale, bias, back=False, group_size=group_size)


def int8_linear_backward(grad_out, codes, scale, *, group_size=256):
    """dx = dy W (..., n) in dy's type; grad_out dy (..., m)."""
    _ops.int8.check_int8_linear_backward(grad_out, codes, scale, group_size=group_size)
    return launch(grad_out, codes, scale, None, back=True, group_size=group_size)
