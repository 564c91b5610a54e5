"""8-bit Adam states to and from bitsandbytes: its Adam8bit and AdamW8bit, of release 0.44 and later.

Codes, blocks of 256, absmax and the maps are the same on both sides; what differs are names, and bitsandbytes' copies of the
maps. bitsandbytes keeps the moments of tensors with fewer than `min_8bit_size` (4096) elements in fp32: those move as they are.
Its blocks are flat, ours of a low-rank gradient begin anew at each row: codes whose rows are no whole blocks are decoded and
encoded again on their way there, and on their way back as they are loaded (`load_state_dict`).
"""

import torch

from lowrank_sys._ops.blockwise import BLOCK, absmax_shape, is_by_row
from lowrank_sys._ops.codebook import dynamic_map

# Ours -> theirs, and whether the moment is signed.
NAMES = {"exp_avg": ("state1", "absmax1", "qmap1", True), "exp_avg_sq": ("state2", "absmax2", "qmap2", False)}


def to_bitsandbytes(state):
    """The state of one parameter in bitsandbytes' layout; tensors are copies.

    Args:
        state: exp_avg, exp_avg_sq: uint8 codes of the parameter's shape, with exp_avg_absmax, exp_avg_sq_absmax: fp32, one a
            block of 256, flat or by row; or fp32 moments without an absmax. step: a 0-dim tensor or a number.

    Returns {state1, state2, step (int)}, and for codes absmax1, absmax2, qmap1, qmap2.

    Raises ValueError for a state that is neither.
    """
    theirs = {"step": int(state["step"])}
    for name, (codes, absmax, qmap, signed) in NAMES.items():
        moment = _moment(state, name, f"{name}_absmax", by_row=True)
        if moment.dtype == torch.uint8:
            moment, scales = _flat(moment, state[f"{name}_absmax"], signed)
            theirs[absmax] = scales.clone()
            theirs[qmap] = dynamic_map(signed, moment.device).clone()
        theirs[codes] = moment.clone()
    return theirs


def _flat(codes, absmax, signed):
    """(codes, absmax) in flat blocks; the same bytes where these cross no row."""
    if not is_by_row(codes, absmax) or codes.shape[-1] % BLOCK == 0:
        return codes, absmax.reshape(-1)
    values = torch.ops.lowrank.dequantize_blockwise(codes, absmax, signed=signed)
    return torch.ops.lowrank.quantize_blockwise(values, signed=signed)


def from_bitsandbytes(state):
    """The state of one parameter from bitsandbytes' layout; tensors are copies.

    Args:
        state: state1, state2, step and, where they are uint8, absmax1, absmax2, qmap1, qmap2, as in
            `optimizer.state[parameter]` or an entry of `state_dict()["state"]`.

    Returns {exp_avg, exp_avg_sq, step (0-dim fp32)}, and for codes exp_avg_absmax, exp_avg_sq_absmax.

    Raises ValueError for a state that is not that of an Adam, or whose codes are of another map or block size.
    """
    ours = {}
    for name, (codes, absmax, qmap, signed) in NAMES.items():
        moment = _moment(state, codes, absmax)
        ours[name] = moment.clone()
        if moment.dtype != torch.uint8:
            continue
        if not torch.equal(state[qmap].to("cpu", torch.float32), dynamic_map(signed)):
            raise ValueError(f"{qmap} is not the dynamic map of {'signed' if signed else 'unsigned'} values")
        ours[f"{name}_absmax"] = state[absmax].clone()
    device = ours["exp_avg"].device
    return ours | {"step": torch.tensor(float(state["step"]), dtype=torch.float32, device=device)}


def _moment(state, name, absmax, by_row=False):
    """Entry `name`: fp32, or uint8 with an absmax that fits it, whose blocks may be `by_row`."""
    moment = state.get(name)
    if not isinstance(moment, torch.Tensor) or moment.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"{name} must be a uint8 or float32 tensor, got {getattr(moment, 'dtype', type(moment).__name__)}")
    if moment.dtype == torch.uint8:
        shape = tuple(state[absmax].shape) if absmax in state else None
        wanted = absmax_shape(moment.shape, by_row and shape is not None and is_by_row(moment, state[absmax]))
        if shape != wanted or state[absmax].dtype != torch.float32:
            raise ValueError(
                f"{absmax} must be float32 of shape {wanted}, one a block of 256 elements of {name} {tuple(moment.shape)}, got "
                f"{'none' if shape is None else shape}"
            )
    return moment
