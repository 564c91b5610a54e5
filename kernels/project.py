"""R = project(G): a GEMM with split-K, and Adam as its epilogue where the caller steps."""

import functools

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.basis import Int4Basis, arguments, load_int4, project_codes, rank, types
from lowrank_sys.kernels.common import SLOTS, dot, is_off, on_device_of, one_each, pick, precision
from lowrank_sys.kernels.epilogue import finish, store_part, sum_parts
from lowrank_sys.kernels.int8_gemm import launch_project_int8
from lowrank_sys.kernels.rule import ADAM, launch_rule

WHOLE = tl.constexpr(configs.WHOLE)
# torch's product of 16-bit operands with an fp32 result.
WIDE_PRODUCT = getattr(torch.ops.aten.mm, "dtype_out", None)


@triton.jit
def project_entries(
    grad,
    basis,
    scale,
    offset,
    squares,
    o_r,
    o_c,
    begin,
    end,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(R (BLOCK_R, BLOCK_C) if LEFT, else transposed, sums of squares (BLOCK_C,) if `squares`) of entries begin ... end - 1."""
    o_d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
    stride = tl.full([], BLOCK_D, tl.int64)
    if LEFT:
        m_row, m_col = o_r < r, o_c < n
        p_a, step_a = basis + o_r[:, None] + o_d[None, :] * r, stride * r
        p_b, step_b = grad + o_d[:, None] * n + o_c[None, :], stride * n
    else:
        m_row, m_col = o_c < m, o_r < r
        p_a, step_a = grad + o_c[:, None] * n + o_d[None, :], stride
        p_b, step_b = basis + o_d[:, None] * r + o_r[None, :], stride * r

    b_r = tl.zeros([BLOCK_R if LEFT else BLOCK_C, BLOCK_C if LEFT else BLOCK_R], tl.float32)
    b_square = tl.zeros([BLOCK_D if LEFT else BLOCK_C, BLOCK_C if LEFT else BLOCK_D], tl.float32)
    for i_d in range(begin, end, BLOCK_D):
        m_d = i_d + tl.arange(0, BLOCK_D) < end
        if not GROUP:
            b_a = tl.load(p_a, mask=m_row[:, None] & m_d[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_d[:, None] & m_col[None, :], other=0.0)
        elif LEFT:
            b_a = load_int4(basis, scale, offset, o_r, i_d, m, r, width, GROUP, BLOCK_R, BLOCK_D)
            b_b = tl.load(p_b, mask=m_d[:, None] & m_col[None, :], other=0.0)
        else:
            b_a = tl.load(p_a, mask=m_row[:, None] & m_d[None, :], other=0.0)
            b_b = tl.trans(load_int4(basis, scale, offset, o_r, i_d, n, r, width, GROUP, BLOCK_R, BLOCK_D))
        b_r = dot(b_a, b_b, b_r, PRECISION)
        if squares is not None:
            b_g = (b_b if LEFT else b_a).to(tl.float32)
            b_square += b_g * b_g
        p_a += step_a
        p_b += step_b
    return b_r, tl.sum(b_square, axis=0 if LEFT else 1)


@triton.jit
def tile_of(o_r, o_c, r, channels, LEFT: tl.constexpr):
    """(offsets, mask) of a tile of R."""
    if LEFT:
        o_tile, m_tile = o_r[:, None] * channels + o_c[None, :], (o_r < r)[:, None] & (o_c < channels)[None, :]
    else:
        o_tile, m_tile = o_c[:, None] * r + o_r[None, :], (o_c < channels)[:, None] & (o_r < r)[None, :]
    return o_tile, m_tile


@triton.jit
def project_kernel(
    grad,
    basis,
    scale,
    offset,
    out,
    exp_avg,
    exp_avg_sq,
    squares,
    scalars,
    partials,
    counters,
    m,
    n,
    r,
    width,
    splits,
    chunk,
    beta1,
    beta2,
    gain1,
    gain2,
    eps,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = R = Bᵀ G (r, n) if LEFT, else G B (m, r); with moments, out = X = Adam(grad_scale * R) instead.

    GaLore (Zhao et al. 2024, Algorithm 2). A program owns one tile of R over one of `splits` parts of the projected axis. With
    partials, the last program to reach a tile adds its parts in order and finishes it, so results do not depend on timing. A
    channel (column of R if LEFT, else row) that is not usable keeps its moments, and its X is NaN for `apply_kernel`.
    For r > BLOCK_R a tile sees a part of its channel: NaN and inf in G reach every part, overflow of a finite G need not.
    With scale and offset, the basis is in INT4, see `load_int4`, and `project_codes` for a 16-bit G; `width` bytes hold a vector.
    A launch serves several matrices of one shape: grad, what the basis is made of, out and the moments are tuples; scalars,
    partials and counters hold one part a matrix. squares (splits, channels), given for one matrix alone, gets the sums of
    squares of G's channels.

    Tiles of more than WHOLE sums have partials (splits, *R's shape) even unsplit, and then no counters, if there are moments.

    Bytes: G once per tile of r, B once per tile of channels, R-sized: moments twice each, out once, partials 2 * splits times.
    """
    i_matrix = tl.program_id(2)
    grad, basis, out = pick(grad, i_matrix), pick(basis, i_matrix), pick(out, i_matrix)
    if GROUP:
        scale, offset = pick(scale, i_matrix), pick(offset, i_matrix)
    if scalars is not None:
        if exp_avg is not None:
            exp_avg, exp_avg_sq = pick(exp_avg, i_matrix), pick(exp_avg_sq, i_matrix)
        scalars += i_matrix * SLOTS
        if is_off(scalars):
            return
    tiles_r = tl.cdiv(r, BLOCK_R)
    # Neighbours share a tile of G, so that for larger r its second read hits the L2 cache.
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_r, i_c = i_tile % tiles_r, i_tile // tiles_r
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    depth, channels = (m, n) if LEFT else (n, m)
    begin = i_split * chunk
    end = tl.minimum(begin + chunk, depth)
    PIECE: tl.constexpr = BLOCK_C if BLOCK_R * BLOCK_C <= WHOLE else 32
    # Sums of squares beside codes, or beside a large tile, leave registers for half as many entries at a time.
    HALF: tl.constexpr = squares is not None and BLOCK_D > 16 and (GROUP > 0 or BLOCK_C > 128)
    DEEP: tl.constexpr = BLOCK_D // 2 if HALF else BLOCK_D
    if GROUP and grad.dtype.element_ty != tl.float32:
        b_r, b_squares = project_codes(
            grad,
            basis,
            scale,
            offset,
            squares,
            o_r,
            o_c,
            begin,
            end,
            m,
            n,
            r,
            width,
            LEFT,
            PRECISION,
            GROUP,
            BLOCK_R,
            BLOCK_C,
            DEEP,
        )
        b_r = b_r if LEFT else tl.trans(b_r)
    else:
        b_r, b_squares = project_entries(
            grad,
            basis,
            scale,
            offset,
            squares,
            o_r,
            o_c,
            begin,
            end,
            m,
            n,
            r,
            width,
            LEFT,
            PRECISION,
            GROUP,
            BLOCK_R,
            BLOCK_C,
            DEEP,
        )

    if squares is not None:
        if i_r == 0:
            tl.store(squares + i_split.to(tl.int64) * channels + o_c, b_squares, mask=o_c < channels)

    o_tile, m_tile = tile_of(o_r, o_c, r, channels, LEFT)
    if partials is None:
        finish(b_r, out, exp_avg, exp_avg_sq, scalars, o_tile, m_tile, beta1, beta2, gain1, gain2, eps, LEFT)
    else:
        size = tl.full([], 1, tl.int64) * r * channels
        partials += i_matrix * splits * size
        last = True
        if counters is not None:
            counters += i_matrix * tl.num_programs(0)
            last = store_part(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile)
        else:
            tl.store(partials + o_tile, b_r, mask=m_tile, cache_modifier=".cg")
            tl.debug_barrier()
        if last:
            # In pieces: the sums of a large tile and what a rule holds besides have no room in registers together.
            for i_piece in range(BLOCK_C // PIECE):
                o_piece = (i_c * BLOCK_C + i_piece * PIECE + tl.arange(0, PIECE)).to(tl.int64)
                o_part, m_part = tile_of(o_r, o_piece, r, channels, LEFT)
                b_sum = sum_parts(partials, splits, size, o_part, m_part)
                finish(b_sum, out, exp_avg, exp_avg_sq, scalars, o_part, m_part, beta1, beta2, gain1, gain2, eps, LEFT)


def counters_of(device):
    """Zeros that count finished splits: they reset themselves, so that one buffer serves all launches of a stream.

    A graph under capture gets its own, which lives as long as the graph: two graphs may be replayed side by side.
    """
    if device.type != "cuda":
        return _zeroed(device)
    if torch.cuda.is_current_stream_capturing():
        return _zeroed.__wrapped__(device)
    return _zeroed(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _zeroed(device, stream=None):
    return torch.zeros(configs.MOST * configs.target(device).counters, dtype=torch.int32, device=device)


def plan_of(grad, basis, *, left, adam=False, squares=False, out=torch.float32):
    """How `launch_project` takes a product, see `configs.plan_project`: `fused` says whether Adam runs in the product's launch."""
    return configs.plan_project(
        *grad.shape,
        rank(basis),
        left=left,
        dtypes=types(grad, basis),
        card=configs.target(grad.device),
        adam=adam,
        squares=squares,
        int4=isinstance(basis, Int4Basis),
        library=WIDE_PRODUCT is not None and (adam or out == torch.float32),
    )


def launch_project(
    grads,
    bases,
    outs,
    *,
    left,
    counters,
    exp_avgs=None,
    exp_avg_sqs=None,
    scalars=None,
    beta1=0.0,
    beta2=0.0,
    eps=0.0,
    squares=None,
):
    """outs <- R, or Adam's update from it if there are moments, for matrices of one shape and one set of dtypes.

    bases: matrices, or each an `Int4Basis`; outs: R's shape, fp32 or the bases' type; scalars: a row a matrix. squares, for one
    matrix alone: a function of the number of splits that gives a buffer (splits, channels) for the sums of squares of G's
    channels; the filled buffer is returned. `plan_of` says how: in one launch, or by cuBLAS with Adam behind it.
    """
    grad, basis, out = grads[0], bases[0], outs[0]
    if out.numel() == 0:
        return
    m, n = grad.shape
    plan = plan_of(grad, basis, left=left, adam=exp_avgs is not None, squares=squares is not None, out=out.dtype)
    adam = {"beta1": beta1, "beta2": beta2, "eps": eps}
    if not plan.fused:
        return _library_project(grads, bases, outs, left, exp_avgs, exp_avg_sqs, scalars, adam)
    split = plan.splits > 1
    partials = torch.empty((len(grads), plan.parts, *out.shape), dtype=torch.float32, device=grad.device) if plan.parts else None
    sums = None if squares is None else squares(plan.splits)
    project_kernel[plan.tiles, plan.splits, len(grads)](
        grad=one_each(grads),
        **arguments(bases),
        out=one_each(outs),
        exp_avg=None if exp_avgs is None else one_each(exp_avgs),
        exp_avg_sq=None if exp_avg_sqs is None else one_each(exp_avg_sqs),
        squares=sums,
        scalars=scalars,
        partials=partials,
        counters=counters if split else None,
        m=m,
        n=n,
        r=rank(basis),
        splits=plan.splits,
        chunk=plan.chunk,
        **adam,
        gain1=1 - beta1,
        gain2=1 - beta2,
        LEFT=left,
        PRECISION=precision(),
        **plan.config,
        **configs.OPTIONS,
    )
    return sums


def _library_project(grads, bases, outs, left, exp_avgs, exp_avg_sqs, scalars, adam):
    """launch_project by torch's product, a matrix at a time; R is in memory before Adam reads it."""
    for i, (grad, basis, out) in enumerate(zip(grads, bases, outs)):
        low_rank_grad = out if exp_avgs is None else torch.empty_like(out, dtype=torch.float32)
        wide_product(*((basis.T, grad) if left else (grad, basis)), low_rank_grad)
        if exp_avgs is not None:
            moments = [exp_avgs[i]], [exp_avg_sqs[i]]
            launch_rule([low_rank_grad], [out], moments, scalars[i : i + 1], rule=ADAM, left=left, **adam)


def wide_product(a, b, out):
    """out <- a @ b: 16-bit operands of one type, fp32 sums and result."""
    if out.is_cuda:
        WIDE_PRODUCT(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)  # where the interpreter plays the card


def project(grad, basis, *, left, int8_gemm=False):
    """R = Bᵀ G (r, n) if left, else G B (m, r); fp32. grad (m, n), basis (m or n, r): fp32 | bf16 | fp16.

    int8_gemm quantises both on the fly, see lowrank_sys.kernels.int8_gemm.
    """
    _ops.projection.check_project(grad, basis, left=left)
    if not int8_gemm:
        return _project(grad, basis, _ops.low_rank_shape(grad, basis, left), left)
    out = torch.empty(_ops.low_rank_shape(grad, basis, left), dtype=torch.float32, device=grad.device)
    with on_device_of(grad):
        launch_project_int8(grad, basis, out, left=left, counters=counters_of(grad.device))
    return out


def project_int4(grad, packed, scale, offset, *, left, group_size=256):
    """project with a basis in INT4, see `quantize_int4`."""
    _ops.int4.check_project_int4(grad, packed, scale, offset, left=left, group_size=group_size)
    basis = Int4Basis(packed, scale, offset, group_size)
    return _project(grad, basis, _ops.int4.int4_low_rank_shape(grad, packed, left), left)


def _project(grad, basis, shape, left):
    out = torch.empty(shape, dtype=torch.float32, device=grad.device)
    with on_device_of(grad):
        launch_project([grad], [basis], [out], left=left, counters=counters_of(grad.device))
    return out
