"""The linear layer on an INT8 weight, forward and backward: a GEMM that dequantizes in registers."""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import dot, on_device_of, precision, store


@triton.jit
def int8_linear_kernel(rows, codes, scale, bias, out, t, m, n,
                       BACK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                       BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (t, m) = x Wᵀ + bias from rows = x (t, n), or if BACK out (t, n) = dy W from rows = dy (t, m); W = scale * codes.

    W (m, n) is dequantized tile by tile, in fp32, and rounded to the rows' type for the product. A tile never holds two groups
    along n: BLOCK_D <= GROUP, or BLOCK_O <= GROUP if BACK.

    Bytes: rows once per tile of outputs, codes once per tile of rows, scales once per tile of W, out once.
    """
    outputs, depth = (n, m) if BACK else (m, n)
    groups = tl.cdiv(n, GROUP)
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    i_t, i_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    o_t = (i_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_o = (i_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_t, m_o = o_t < t, o_o < outputs
    stride = tl.full([], BLOCK_D, tl.int64)
    p_rows = rows + o_t[:, None] * depth + o_d[None, :]
    if BACK:
        p_codes, step = codes + o_d[:, None] * n + o_o[None, :], stride * n
        p_scale = scale + o_d * groups + i_o * BLOCK_O // GROUP
    else:
        p_codes, step = codes + o_o[None, :] * n + o_d[:, None], stride
        p_scale = scale + o_o * groups

    b_out = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for i_d in range(0, depth, BLOCK_D):
        m_d = i_d + tl.arange(0, BLOCK_D) < depth
        b_rows = tl.load(p_rows, mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_codes = tl.load(p_codes, mask=m_d[:, None] & m_o[None, :], other=0).to(tl.float32)
        if BACK:
            b_w = b_codes * tl.load(p_scale, mask=m_d, other=0.0)[:, None]
            p_scale += stride * groups
        else:
            b_w = b_codes * tl.load(p_scale + i_d // GROUP, mask=m_o, other=0.0)[None, :]
        b_out = dot(b_rows, b_w.to(b_rows.dtype), b_out, PRECISION)
        p_rows += BLOCK_D
        p_codes += step

    if bias is not None:
        b_out += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    store(out + o_t[:, None] * outputs + o_o[None, :], b_out, m_t[:, None] & m_o[None, :])


def launch(rows, codes, scale, bias, *, back, group_size):
    """x (..., n) -> y (..., m), or dy (..., m) -> dx (..., n) if `back`."""
    m, n = codes.shape
    depth, outputs = (m, n) if back else (n, m)
    out = torch.empty((*rows.shape[:-1], outputs), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    t = out.numel() // outputs
    config = configs.int8_linear(m=m, n=n, back=back, dtype=rows.dtype, group_size=group_size)
    with on_device_of(rows):
        int8_linear_kernel[triton.cdiv(t, config["BLOCK_T"]) * triton.cdiv(outputs, config["BLOCK_O"]),](
            rows=rows,
            codes=codes,
            scale=scale,
            bias=bias,
            out=out,
            t=t,
            m=m,
            n=n,
            BACK=back,
            GROUP=group_size,
            PRECISION=precision(),
            **config,
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
