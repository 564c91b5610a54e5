"""Adam's moments across a refresh, in fp32 or as 8-bit codes with an absmax a block."""

import torch


def first_moment(state):
    """The first moment in fp32, decoded if it is codes; None if a rule keeps none of this kind."""
    moment = state.get("exp_avg")
    if moment is not None and moment.dtype == torch.uint8:
        return torch.ops.lowrank.dequantize_blockwise(moment, state["exp_avg_absmax"], signed=True)
    return moment


def reset(*tensors):
    """Forget: moments, their absmax, and the step that corrects their bias."""
    for tensor in tensors:
        tensor.zero_()


def rotate(exp_avg, exp_avg_sq, absmaxes, old, new, kept, *, left):
    """Carry both moments from basis `old` to `new` (d, r); codes (absmaxes of both, else empty) are decoded and encoded.

    Where the basis was `kept` (0-dim bool) codes keep their bytes, which encoding again could move.
    """
    if not absmaxes:
        torch.ops.lowrank.rotate_moments_(exp_avg, exp_avg_sq, old, new, left=left)
        return
    stored = list(zip((exp_avg, exp_avg_sq), absmaxes, (True, False)))
    decoded = [torch.ops.lowrank.dequantize_blockwise(codes, absmax, signed=signed) for codes, absmax, signed in stored]
    torch.ops.lowrank.rotate_moments_(*decoded, old, new, left=left)
    for value, (codes, absmax, signed) in zip(decoded, stored):
        for before, made in zip((codes, absmax), torch.ops.lowrank.quantize_blockwise(value, signed=signed)):
            before.copy_(torch.where(kept, before, made))
