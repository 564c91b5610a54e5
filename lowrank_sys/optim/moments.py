"""The moments of a rule in a state: what they are, and whether they are kept in fp32 or in 8 bits."""

import math
from typing import NamedTuple

import torch

from lowrank_sys._ops.blockwise import BLOCK, absmax_shape
from lowrank_sys.optim.weight import weight_store
from lowrank_sys.subspace.moments import absmax_of, decode, encode, is_by_row, is_coded
from lowrank_sys.subspace.shards import WHOLE

# Moments of fewer elements stay in fp32, as in bitsandbytes.
MIN_8BIT_SIZE = 4096
# So do those of low-rank gradients with shorter rows: a scale a row would be much of their memory.
MIN_8BIT_ROW = 64


# The axis of a moment that is a square of the short side.
SHORT = "short"


class Moment(NamedTuple):
    """What a rule keeps of a gradient R (rows, columns): of its shape, or one number a row (`axis` 0) or a column (1), or a matrix
    of its short side (SHORT).

    signed: whether it has both signs, which says how 8 bits code it and how a new basis rotates it.
    """

    signed: bool = True
    axis: int | str | None = None

    def shape(self, low_rank):
        """Of the tensor, for a gradient of this shape."""
        short = (min(low_rank),) * 2 if len(low_rank) == 2 else ()
        return {None: tuple(low_rank), 0: (*low_rank[:1], 1), 1: (1, *low_rank[1:]), SHORT: short}[self.axis]


class Fp32:
    """Moments as they are."""

    name = "fp32"
    categories = {}
    low_rank = False  # whether moments of groups with a rank are kept as codes

    def codes(self, shape, param, group, rows=None):
        """Whether moments of this shape are kept as codes. rows: of the whole, where these are some of its rows."""
        return False

    def init(self, state, moments, shape, param, group, rows=None):
        """Add the tensors of `moments`, {name: Moment}, for a gradient of this shape; rows: as in `codes`."""
        coded = self.codes(shape, param, group, rows)
        for name, moment in moments.items():
            coded_one = coded and moment.axis is None
            dtype = torch.uint8 if coded_one else torch.float32
            state[name] = torch.zeros(moment.shape(shape), dtype=dtype, device=param.device)
            if coded_one:  # blocks of zeros, whatever their codes
                scales = absmax_shape(shape, by_row="rank" in group)
                state[absmax_of(name)] = torch.zeros(scales, dtype=torch.float32, device=param.device)


class Blocks8bit(Fp32):
    """Codes in blocks of 256 with an fp32 absmax each (Dettmers et al. 2022); of fewer than the group's `min_8bit_size` elements
    fp32, as in bitsandbytes, but for INT8 weights.

    Blocks of a low-rank gradient begin anew at each of its rows, so that shards of rows hold what the whole would; rows of fewer
    than 64 elements stay in fp32.
    """

    name = "8bit"
    low_rank = True
    categories = {absmax_of(name): "scales" for name in ("exp_avg", "exp_avg_sq")}

    def codes(self, shape, param, group, rows=None):
        if rows is None and 0 in shape:  # nothing to keep
            return False
        if rows is not None:
            if "rank" not in group and (len(shape) < 2 or math.prod(shape[1:]) % BLOCK):  # blocks would cross into other shards
                return False
            shape = torch.Size((rows, *shape[1:]))
        if "rank" in group and not (self.low_rank and shape[-1] >= MIN_8BIT_ROW):
            return False
        return torch.Size(shape).numel() >= group["min_8bit_size"] or weight_store(param).int8


class Plain8bit(Blocks8bit):
    """8 bits in groups without a rank, fp32 in the others, where moments are small."""

    name = "plain-8bit"
    low_rank = False


class Opened:
    """The moments of one matrix while a rule advances them: attributes in fp32, copies of what the state holds.

    step: 0-dim, counts this step. ok: bool, broadcast to R: which channels (without a basis: elements) count. d: the projected
    axis, None without a basis. grad_scale: 0-dim or None, that R has and G has not. rate: what weight decay is multiplied by.
    weight_rms(): root of the mean square of the weight. weight[rows]: rows of it in fp32. shard: that the rows are of, for sums
    over them. sums: a remainder's own, which may keep more here.
    """

    d = grad_scale = ok = rate = weight_rms = weight = sums = None
    shard = WHOLE

    def __init__(self, state, moments):
        self._state, self._moments = state, moments
        self.step = state["step"]
        for name, moment in moments.items():
            value = decode(state, name, moment.signed)
            setattr(self, name, value if is_coded(state, name) else value.clone())

    def close(self):
        """Write the moments back where `ok`; the others stay as they are, to the byte."""
        for name, moment in self._moments.items():
            old, ok = decode(self._state, name, moment.signed), self.ok
            none = ~(ok.any(-1, keepdim=True) if is_by_row(self._state, name) else ok.any())
            if moment.axis == SHORT:
                ok = ok.any()
            elif moment.axis is not None:
                ok = ok.any(1 - moment.axis, keepdim=True)
                ok = self.shard.any(ok) if moment.axis == 1 else ok
            encode(self._state, name, moment.signed, torch.where(ok, getattr(self, name), old), none)


def first_of(state, moments):
    """The first moment of R's shape in fp32, where a rule keeps one."""
    name = next((name for name, moment in moments.items() if moment.signed and moment.axis is None), None)
    return None if name is None else decode(state, name, True)


def refreshed(moments):
    """{name: signed} of the moments that a new basis concerns: those of R's shape."""
    return {name: moment.signed for name, moment in moments.items() if moment.axis is None}
