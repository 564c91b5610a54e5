"""Adam on a gradient that is already projected."""

import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import GRAD_SCALE, SLOTS, adam, is_off, pick, store, usable_channels


@triton.jit
def adam_kernel(
    low_rank_grad,
    out,
    exp_avg,
    exp_avg_sq,
    scalars,
    channels,
    r,
    beta1,
    beta2,
    gain1,
    gain2,
    eps,
    LEFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = X = Adam(grad_scale * R) for R (r, channels) if LEFT, else (channels, r); NaN in channels that are not usable.

    Kingma and Ba 2015, with torch.optim.AdamW's bias corrections. A program owns whole channels: it tests them, then steps.
    A launch serves several matrices of one shape: R, out and the moments are tuples, scalars has a row a matrix.

    Bytes per element of R: R twice (the second time from the cache), moments twice each, out once.
    """
    i_matrix = tl.program_id(1)
    low_rank_grad, out = pick(low_rank_grad, i_matrix), pick(out, i_matrix)
    exp_avg, exp_avg_sq = pick(exp_avg, i_matrix), pick(exp_avg_sq, i_matrix)
    scalars += i_matrix * SLOTS
    if is_off(scalars):
        return
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    stride = tl.full([], BLOCK_R, tl.int64)
    if LEFT:
        o_first, step = o_r[:, None] * channels + o_c[None, :], stride * channels
    else:
        o_first, step = o_c[:, None] * r + o_r[None, :], stride
    grad_scale = tl.load(scalars + GRAD_SCALE)

    o_tile = o_first
    b_ok = tl.full([1, BLOCK_C] if LEFT else [BLOCK_C, 1], 1, tl.int1)
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        m_tile = (m_r[:, None] & (o_c < channels)[None, :]) if LEFT else ((o_c < channels)[:, None] & m_r[None, :])
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_ok = b_ok & usable_channels(b_g, LEFT)
        o_tile += step

    o_tile = o_first
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        m_tile = (m_r[:, None] & (o_c < channels)[None, :]) if LEFT else ((o_c < channels)[:, None] & m_r[None, :])
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_x = adam(b_g, b_ok, exp_avg + o_tile, exp_avg_sq + o_tile, m_tile, scalars, beta1, beta2, gain1, gain2, eps)
        store(out + o_tile, b_x, m_tile)
        o_tile += step


def launch_adam(low_rank_grads, outs, *, left, exp_avgs, exp_avg_sqs, scalars, beta1, beta2, eps):
    """outs <- Adam's update from R, for matrices of one shape; moments in place. outs: R's shape, fp32 or the bases' type."""
    if outs[0].numel() == 0:
        return
    rows, cols = outs[0].shape
    channels, r = (cols, rows) if left else (rows, cols)
    adam_kernel[configs.cdiv(channels, configs.ADAM["BLOCK_C"]), len(outs)](
        low_rank_grad=tuple(low_rank_grads),
        out=tuple(outs),
        exp_avg=tuple(exp_avgs),
        exp_avg_sq=tuple(exp_avg_sqs),
        scalars=scalars,
        channels=channels,
        r=r,
        beta1=beta1,
        beta2=beta2,
        gain1=1 - beta1,
        gain2=1 - beta2,
        eps=eps,
        LEFT=left,
        **configs.ADAM,
        **configs.OPTIONS,
    )
