"""W = scale B A + S: a GEMM with the scatter-add of a sparse matrix as its epilogue."""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import dot, on_device_of, precision, store

TOGETHER = tl.constexpr(8)  # tiles of rows whose programs are neighbours


@triton.jit
def first_at_least(p_columns, column, k, steps, m_m):
    """Of each row of rising columns, from `p_columns` on, how many of its k are below `column`."""
    b_low = tl.zeros(m_m.shape, tl.int32)
    b_high = b_low + k
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        b_open = b_low < b_high
        b_below = tl.load(p_columns + b_middle, mask=m_m & b_open, other=0) < column
        b_low = tl.where(b_open & b_below, b_middle + 1, b_low)
        b_high = tl.where(b_open & ~b_below, b_middle, b_high)
    return b_low


@triton.jit
def scatter_add_product_kernel(
    b,
    a,
    values,
    columns,
    out,
    m,
    n,
    r,
    k,
    steps,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out (m, n) = scale B A + S from b (m, r), a (r, n), and k values and rising columns in each row.

    A program makes a tile. Its entries of S are those of each row between two columns, found by halving in `steps` steps; one a row
    is added at a time, in registers, to where its column is: nothing is stored twice, and W is rounded once.

    Bytes: b once per tile of columns, a once per tile of rows, values once, columns twice and what halving reads, out once.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, TOGETHER)
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_m, m_n = o_m < m, o_n < n
    p_b = b + o_m[:, None] * r + o_r[None, :]
    p_a = a + o_r[:, None].to(tl.int64) * n + o_n[None, :]
    stride = tl.full([], BLOCK_R, tl.int64)

    b_w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + o_r < r
        b_b = tl.load(p_b, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_a = tl.load(p_a, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_w = dot(b_b, b_a, b_w, PRECISION)
        p_b += BLOCK_R
        p_a += stride * n
    b_w = scale * b_w

    p_columns = columns + o_m * k
    b_first = first_at_least(p_columns, i_n * BLOCK_N, k, steps, m_m)
    b_count = first_at_least(p_columns, (i_n + 1) * BLOCK_N, k, steps, m_m) - b_first
    b_here = o_n.to(tl.int32)
    for i in range(tl.max(b_count)):
        m_entry = m_m & (i < b_count)
        b_column = tl.load(p_columns + b_first + i, mask=m_entry, other=-1)
        b_value = tl.load(values + o_m * k + b_first + i, mask=m_entry, other=0.0).to(tl.float32)
        b_w += tl.where(b_column[:, None] == b_here[None, :], b_value[:, None], 0.0)
    store(out + o_m[:, None] * n + o_n[None, :], b_w, m_m[:, None] & m_n[None, :])


def scatter_add_product(b, a, values, columns, *, scale=1.0, dtype=None):
    """W (m, n) = scale B A + S in `dtype`, or B's; shapes and types as the oracle's."""
    _ops.scatter_add.check_scatter_add_product(b, a, values, columns, dtype=dtype)
    (m, r), n, k = b.shape, a.shape[1], values.shape[1]
    out = torch.empty((m, n), dtype=dtype or b.dtype, device=b.device)
    if out.numel() == 0:
        return out
    config = configs.scatter_add(n, r)
    with on_device_of(b):
        scatter_add_product_kernel[(configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]),)](
            b=b,
            a=a,
            values=values,
            columns=columns,
            out=out,
            m=m,
            n=n,
            r=r,
            k=k,
            steps=k.bit_length(),
            scale=float(scale),
            PRECISION=precision(),
            **config,
            **configs.OPTIONS,
        )
    return out
