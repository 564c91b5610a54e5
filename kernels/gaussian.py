"""Products with a Gaussian basis that is made in registers from its seed: the same bits as csrc/core/gaussian.h and the oracle."""

import math

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import dot, is_off, on_device_of, precision, store
from lowrank_sys.kernels.epilogue import finish_sum
from lowrank_sys.kernels.project import counters_of
from lowrank_sys.reference import gaussian as reference

# A counter of Philox serves four rows that lie ROWS apart; a basis' counters have the tag in their second word.
ROWS = tl.constexpr(reference.ROWS)
GROUP = tl.constexpr(4 * reference.ROWS)
TAG = tl.constexpr(reference.TAG)
L0, L1, L2, L3, L4, L5, L6 = (tl.constexpr(c) for c in reference.LOG)
S0, S1, S2, S3 = (tl.constexpr(c) for c in reference.SINE)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in reference.COSINE)


@triton.jit
def normal_pair(b_first, b_second):
    """Two independent normals from two words: Box and Muller 1958, rounded as the oracle's, operation by operation."""
    b_u = ((b_first >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    b_shifted = b_u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    b_e = ((b_shifted >> 23) - 127).to(tl.float32)
    b_f = ((b_shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    b_p = (((((b_f * L0 + L1) * b_f + L2) * b_f + L3) * b_f + L4) * b_f + L5) * b_f + L6
    b_log = (b_e * 0.69314718 + (b_f + b_f * b_f * b_p)) * -2.0
    b_radius = tl.sqrt_rn(b_log)
    b_t = (((b_second >> 8) & 0x3FFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.384185791015625e-07 - 0.5
    b_y = b_t * b_t
    b_sine = (((b_y * S0 + S1) * b_y + S2) * b_y + S3) * b_t
    b_cosine = (((b_y * C0 + C1) * b_y + C2) * b_y + C3) * b_y + C4
    b_odd, b_upper = ((b_second >> 30) & 1) == 1, (b_second >> 31) == 1
    b_a, b_b = tl.where(b_odd, b_sine, b_cosine), tl.where(b_odd, b_cosine, b_sine)
    return b_radius * tl.where(b_odd != b_upper, -b_a, b_a), b_radius * tl.where(b_upper, -b_b, b_b)


@triton.jit
def four_rows(i_group, o_l, o_j, rank, gain, seed, refresh, parameter):
    """B[64 i_group + 16 k + o_l, o_j] for k = 0 ... 3; o_l and o_j broadcast against each other."""
    o_counter = (i_group.to(tl.int64) * ROWS + o_l) * rank + o_j
    c0, c1 = o_counter.to(tl.uint32), (o_counter >> 32).to(tl.uint32) | TAG
    zero = tl.zeros_like(c0)
    b_0, b_1, b_2, b_3 = tl.philox(seed, c0, c1, zero + refresh.to(tl.uint32), zero + parameter.to(tl.uint32))
    b_a, b_b = normal_pair(b_0, b_1)
    b_c, b_d = normal_pair(b_2, b_3)
    return b_a * gain, b_b * gain, b_c * gain, b_d * gain


@triton.jit
def which_basis(key, seed, refresh, parameter, first):
    """The four numbers that say which basis it is: from the device if there is a key, else as they were given."""
    if key is not None:
        return tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    one = tl.full([], 1, tl.int64)
    return one * seed, one * refresh, one * parameter, one * first


@triton.jit
def gaussian_basis_kernel(out, seed, refresh, parameter, first, d, rank, gain, BLOCK_R: tl.constexpr):
    """out <- rows first ... first + d - 1 of the basis. A program makes 64 rows of BLOCK_R columns. Bytes: out once."""
    seed, refresh, parameter, first = which_basis(None, seed, refresh, parameter, first)
    i_group = first // GROUP + tl.program_id(0)
    o_l = tl.arange(0, ROWS).to(tl.int64)[:, None]
    o_j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
    b_rows = four_rows(i_group, o_l, o_j, rank, gain, seed, refresh, parameter)
    for k in tl.static_range(4):
        o_d = i_group * GROUP + k * ROWS + o_l - first
        store(out + o_d * rank + o_j, b_rows[k], (o_d >= 0) & (o_d < d) & (o_j < rank))


@triton.jit
def gaussian_project_kernel(
    grad,
    out,
    squares,
    scalars,
    partials,
    counters,
    key,
    seed,
    refresh,
    parameter,
    first,
    m,
    n,
    r,
    splits,
    chunk,
    gain,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = R = Bᵀ G (r, n) if LEFT, else G B (m, r), for the basis of (seed, refresh, parameter), 64 rows at a time in registers.

    Flora (Hao et al. 2024), APOLLO (Zhu et al. 2024). Split, summed and finished as in `project_kernel`; `chunk` counts entries
    of the projected axis from the first group on. squares (splits, channels) gets the sums of squares of G's channels.

    Bytes: G once per tile of r, out once, partials 2 * splits times; B never.
    """
    if scalars is not None:
        if is_off(scalars):
            return
    seed, refresh, parameter, first = which_basis(key, seed, refresh, parameter, first)
    tiles_r = tl.cdiv(r, BLOCK_R)
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_r, i_c = i_tile % tiles_r, i_tile // tiles_r
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_l = tl.arange(0, ROWS).to(tl.int64)
    d, channels = (m, n) if LEFT else (n, m)
    m_c = o_c < channels
    # Entries of the projected axis count from the beginning of the group that holds the first.
    skip = first % GROUP
    begin = i_split * chunk
    end = tl.minimum(begin + chunk, d + skip)

    b_r = tl.zeros([BLOCK_R if LEFT else BLOCK_C, BLOCK_C if LEFT else BLOCK_R], tl.float32)
    b_square = tl.zeros([ROWS if LEFT else BLOCK_C, BLOCK_C if LEFT else ROWS], tl.float32)
    for i_d in range(begin, end, GROUP):
        i_group = first // GROUP + i_d // GROUP
        if LEFT:
            b_rows = four_rows(i_group, o_l[None, :], o_r[:, None], r, gain, seed, refresh, parameter)
        else:
            b_rows = four_rows(i_group, o_l[:, None], o_r[None, :], r, gain, seed, refresh, parameter)
        for k in tl.static_range(4):
            o_d = i_d + k * ROWS + o_l - skip
            m_d = (o_d >= 0) & (o_d < d)
            if LEFT:
                b_g = tl.load(grad + o_d[:, None] * n + o_c[None, :], mask=m_d[:, None] & m_c[None, :], other=0.0)
                b_r = dot(b_rows[k], b_g.to(tl.float32), b_r, PRECISION)
            else:
                b_g = tl.load(grad + o_c[:, None] * n + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0.0)
                b_r = dot(b_g.to(tl.float32), b_rows[k], b_r, PRECISION)
            if squares is not None:
                b_square += b_g.to(tl.float32) * b_g.to(tl.float32)

    if squares is not None:
        if i_r == 0:
            tl.store(squares + i_split.to(tl.int64) * channels + o_c, tl.sum(b_square, axis=0 if LEFT else 1), mask=m_c)
    if LEFT:
        o_tile, m_tile = o_r[:, None] * n + o_c[None, :], (o_r < r)[:, None] & m_c[None, :]
    else:
        o_tile, m_tile = o_c[:, None] * r + o_r[None, :], m_c[:, None] & (o_r < r)[None, :]
    size = tl.full([], 1, tl.int64) * r * channels
    b_r, last = finish_sum(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile)
    if last:
        store(out + o_tile, b_r, m_tile)


@triton.jit
def gaussian_back_project_kernel(
    param,
    low_rank,
    seed,
    refresh,
    parameter,
    first,
    alpha,
    beta,
    m,
    n,
    r,
    gain,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W <- beta W + alpha (B X if LEFT, else X Bᵀ), in place, for the basis of (seed, refresh, parameter).

    A program owns 64 entries of the projected axis, one group of rows of B, and BLOCK_C channels.

    Bytes: W read once and written once, X once per group of rows; B never.
    """
    seed, refresh, parameter, first = which_basis(None, seed, refresh, parameter, first)
    i_group = first // GROUP + tl.program_id(0)
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_l = tl.arange(0, ROWS).to(tl.int64)
    d, channels = (m, n) if LEFT else (n, m)
    m_c = o_c < channels
    b_zero = tl.zeros([ROWS if LEFT else BLOCK_C, BLOCK_C if LEFT else ROWS], tl.float32)
    b_0, b_1, b_2, b_3 = b_zero, b_zero, b_zero, b_zero
    for i_r in range(0, r, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R).to(tl.int64)
        m_r = o_r < r
        if LEFT:
            b_rows = four_rows(i_group, o_l[:, None], o_r[None, :], r, gain, seed, refresh, parameter)
            b_x = tl.load(low_rank + o_r[:, None] * n + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
            b_0, b_1 = dot(b_rows[0], b_x, b_0, PRECISION), dot(b_rows[1], b_x, b_1, PRECISION)
            b_2, b_3 = dot(b_rows[2], b_x, b_2, PRECISION), dot(b_rows[3], b_x, b_3, PRECISION)
        else:
            b_rows = four_rows(i_group, o_l[None, :], o_r[:, None], r, gain, seed, refresh, parameter)
            b_x = tl.load(low_rank + o_c[:, None] * r + o_r[None, :], mask=m_c[:, None] & m_r[None, :], other=0.0)
            b_0, b_1 = dot(b_x, b_rows[0], b_0, PRECISION), dot(b_x, b_rows[1], b_1, PRECISION)
            b_2, b_3 = dot(b_x, b_rows[2], b_2, PRECISION), dot(b_x, b_rows[3], b_3, PRECISION)
    b_backs = (b_0, b_1, b_2, b_3)
    for k in tl.static_range(4):
        o_d = i_group * GROUP + k * ROWS + o_l - first
        m_d = (o_d >= 0) & (o_d < d)
        if LEFT:
            p_w, m_w = param + o_d[:, None] * n + o_c[None, :], m_d[:, None] & m_c[None, :]
        else:
            p_w, m_w = param + o_c[:, None] * n + o_d[None, :], m_c[:, None] & m_d[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
        b_w = tl.where(beta == 0, 0.0, b_w)  # as in BLAS, 0 * NaN is 0
        store(p_w, beta * b_w + alpha * b_backs[k], m_w)


def gain(rank):
    """1/sqrt(rank), rounded to fp32 once."""
    return torch.tensor(1.0 / math.sqrt(rank), dtype=torch.float32).item()


def groups(first, d):
    """Groups of 64 rows that hold rows first ... first + d - 1."""
    return (first + d - 1) // GROUP.value - first // GROUP.value + 1


def launch_gaussian_project(
    grad, out, *, left, counters, key=None, seed=0, step=0, parameter=0, first=0, squares=None, scalars=None
):
    """out <- R for the basis of (seed, step, parameter, first), or of `key`, which holds these four on the device (int64).

    squares: a function of the number of splits that gives a buffer (splits, channels), which it returns filled; or None.
    """
    m, n = grad.shape
    r = out.shape[0 if left else 1]
    plan = configs.plan_gaussian_project(m, n, r, left=left, dtype=grad.dtype, card=configs.target(grad.device))
    split = plan.splits > 1
    partials = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=grad.device) if split else None
    sums = None if squares is None else squares(plan.splits)
    gaussian_project_kernel[plan.tiles, plan.splits](
        grad=grad,
        out=out,
        squares=sums,
        scalars=scalars,
        partials=partials,
        counters=counters if split else None,
        key=key,
        seed=seed,
        refresh=step,
        parameter=parameter,
        first=first,
        m=m,
        n=n,
        r=r,
        splits=plan.splits,
        chunk=plan.chunk,
        gain=gain(r),
        LEFT=left,
        PRECISION=precision(),
        **plan.config,
        **configs.OPTIONS,
    )
    return sums


def gaussian_basis_(out, *, seed, step, parameter, first=0):
    """out <- rows first ... of the basis (d, rank) of N(0, 1/rank); out fp32 | bf16 | fp16. step counts refreshes."""
    _ops.gaussian.check_basis(out, first)
    d, rank = out.shape
    if out.numel() == 0:
        return
    config = configs.GAUSSIAN_BASIS
    with on_device_of(out):
        gaussian_basis_kernel[groups(first, d), configs.cdiv(rank, config["BLOCK_R"])](
            out=out,
            seed=seed,
            refresh=step,
            parameter=parameter,
            first=first,
            d=d,
            rank=rank,
            gain=gain(rank),
            **config,
            **configs.OPTIONS,
        )


def gaussian_project(grad, *, rank, left, seed, step, parameter, first=0):
    """R = Bᵀ G (rank, n) if left, else G B (m, rank); fp32. grad (m, n) fp32 | bf16 | fp16; step counts refreshes, `first` is the
    index of the projected axis' first entry in the unsharded tensor."""
    _ops.gaussian.check_project(grad, rank, first)
    m, n = grad.shape
    out = torch.empty((rank, n) if left else (m, rank), dtype=torch.float32, device=grad.device)
    if out.numel():
        with on_device_of(grad):
            launch_gaussian_project(
                grad, out, left=left, counters=counters_of(grad.device), seed=seed, step=step, parameter=parameter, first=first
            )
    return out


def gaussian_back_project_(param, low_rank, *, alpha=1.0, beta=1.0, left, seed, step, parameter, first=0):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X (r, n) if left, else (m, r), fp32.

    beta = 0 does not depend on W, as in BLAS.
    """
    _ops.gaussian.check_back_project(param, low_rank, left, first)
    if param.numel() == 0:
        return
    m, n = param.shape
    r = low_rank.shape[0 if left else 1]
    d, channels = (m, n) if left else (n, m)
    config = configs.GAUSSIAN_BACK_PROJECT
    with on_device_of(param):
        gaussian_back_project_kernel[groups(first, d), configs.cdiv(channels, config["BLOCK_C"])](
            param=param,
            low_rank=low_rank,
            seed=seed,
            refresh=step,
            parameter=parameter,
            first=first,
            alpha=alpha,
            beta=beta,
            m=m,
            n=n,
            r=r,
            gain=gain(r),
            LEFT=left,
            PRECISION=precision(),
            **config,
            **configs.OPTIONS,
        )
