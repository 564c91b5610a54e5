"""Weight stores: how an optimizer keeps the weights, and the only writers of them. A parameter and its group say which it has."""

import math

import torch

from lowrank_sys._ops import FLOATS
from lowrank_sys.nn import codings
from lowrank_sys.nn.quant_shards import is_shardable
from lowrank_sys.nn.quant_weight import decoded, drop_exact, is_quantized, low_rank_part, rows_here
from lowrank_sys.optim.merging import merge
from lowrank_sys.subspace.shards import WHOLE

# Bytes of fp32 that a weight passes through, a panel of rows at a time.
PANEL = 16 << 20


def by_rows(params):
    """The weights as ops write them: one whose memory is laid out otherwise (channels_last, a transpose) as a copy in rows."""
    return [param if param.is_contiguous() else param.contiguous() for param in params]


def put_back(params, written):
    """Give the weights that `by_rows` copied their new values."""
    for param, values in zip(params, written):
        if values is not param:
            param.copy_(values)


def panels(shape):
    """Yield (first, end) of rows whose elements take PANEL bytes in fp32."""
    high = max(1, PANEL // (4 * max(1, math.prod(shape[1:]))))
    for first in range(0, shape[0] if shape else 1, high):
        yield first, min(first + high, shape[0])


def _part(tensor, shape, first, end):
    """Rows first ... end - 1 of what is broadcast to a weight's shape."""
    return tensor[first:end] if tensor.dim() == len(shape) and tensor.shape[0] == shape[0] else tensor


def _number(state):
    if "parameter" not in state:
        raise ValueError("stochastic_rounding must be set before a group's first step, or be loaded: its states lack `parameter`")
    return state["parameter"]


class Rows:
    """rows[first:end] of a weight in its store, fp32."""

    def __init__(self, store, param):
        self._store, self._param = store, param

    def __getitem__(self, rows):
        return self._store.values(self._param, rows.start, rows.stop)


class InPlace:
    """The parameter itself, in its own dtype (fp32, bf16 or fp16), rounded to nearest even once a step."""

    name = "float"  # in the table of fused steps
    int8 = False
    stochastic = False
    group_size = None

    def check(self, param, name):
        """Raise a ValueError that names a weight that cannot be kept so."""
        if param.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")

    def init(self, state, index):
        """Add this store's state for weight `index` of the optimizer."""

    def tensors(self, params):
        """The lists of tensors that ops take for the weights: themselves or their codes, and scales."""
        return params, []

    def options(self, group, states):
        """The arguments of the ops that belong to the weights."""
        return {}

    def values(self, param, first, end):
        """Rows first ... end - 1 in fp32."""
        return (param[first:end] if param.dim() else param).float()

    def rms(self, param, shard=WHOLE):
        """Root of the mean square, 0-dim fp32; of all rows of a shard."""
        norms = [torch.linalg.vector_norm(self.values(param, *rows)) for rows in panels(param.shape)]
        norms = norms or [torch.zeros((), device=param.device)]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        rows = shard.rows or (param.shape[0] if param.dim() else 1)
        return shard.norms(norm) / math.sqrt(max(rows * math.prod(param.shape[1:]), 1))

    def apply(self, param, state, change, *, decay, ok, seed):
        """W <- decay W - change where ok, else as it is.

        change: a lowrank_sys.optim.update.Change. decay: 0-dim; None is 1. ok: bool, broadcast to W. seed: of random bits.
        """
        if change.is_low_rank(param) and (param.dtype == torch.float32 or (decay is None and not self.stochastic)):
            if decay is not None:
                param.mul_(torch.where(ok, decay, 1.0))
            change.subtract_from(param)
            return
        whole = param.unsqueeze(0) if param.dim() == 0 else param
        for first, end in panels(whole.shape):
            old = whole[first:end].float()
            new = (old if decay is None else decay * old) - change.panel(first, end)
            self.put(whole[first:end], torch.where(_part(ok, param.shape, first, end), new, old), state, seed, first)

    def put(self, rows, values, state, seed, first):
        """rows, from row `first` of a weight on, <- values (fp32)."""
        rows.copy_(values)


class Stochastic(InPlace):
    """The parameter itself, rounded stochastically once a step unless it is fp32: what a step adds or decays is there in the mean,
    even if it is less than half of the weight's last place.

    The random bits follow from the group's `seed`, the step and the number of the weight: a resumed run draws the same.
    State of a weight: `parameter`, its number.
    """

    stochastic = True

    def init(self, state, index):
        state["parameter"] = index

    def options(self, group, states):
        offsets = [s["offset"] for s in states if "offset" in s]
        return {"stochastic": True, "seed": group.get("seed", 0), "parameters": [_number(s) for s in states], "offsets": offsets}

    def put(self, rows, values, state, seed, first):
        written = rows.contiguous()
        torch.ops.lowrank.round_stochastic_(
            written, values.contiguous(), seed=seed, step=state["step"], parameter=_number(state),
            offset=state.get("offset", 0) + first * math.prod(rows.shape[1:]),
        )  # fmt: skip
        if written is not rows:
            rows.copy_(written)


class Int8(Stochastic):
    """INT8 codes and their scales (lowrank_sys.nn.QuantWeight), rounded stochastically once a step, with random bits as those."""

    name = "int8"
    int8 = True

    def __init__(self, group_size):
        self.group_size = group_size

    def check(self, param, name):
        """Raise a ValueError for codes that steps are not rounded to."""
        coding = rows_here(param).coding
        if coding != codings.Int8:
            raise ValueError(f"{name} must be float or INT8, or trained by LoQT, got {coding.name.upper()}")

    def tensors(self, params):
        drop_exact(*params)
        return [p.codes for p in params], [p.scale for p in params]

    def options(self, group, states):
        numbers, offsets = [s["parameter"] for s in states], [s["offset"] for s in states if "offset" in s]
        return {"seed": group["seed"], "parameters": numbers, "offsets": offsets, "group_size": self.group_size}

    def values(self, param, first, end):
        return torch.ops.lowrank.dequantize_int8(param.codes[first:end], param.scale[first:end], group_size=self.group_size)

    def apply(self, param, state, change, *, decay, ok, seed):
        drop_exact(param)
        nothing = torch.full((), math.nan, dtype=torch.float32, device=param.device)  # keeps a weight to the byte
        minus = -torch.ones((), dtype=torch.float32, device=param.device)
        decay = -minus if decay is None else decay
        for first, end in panels(param.shape):
            moved = torch.where(_part(ok, param.shape, first, end), change.panel(first, end), nothing)
            torch.ops.lowrank.int8_update_(
                param.codes[first:end], param.scale[first:end], moved, alpha=minus, decay=decay, seed=seed,
                step=state["step"], parameter=state["parameter"], offset=state.get("offset", 0) + first * param.shape[1],
                group_size=self.group_size,
            )  # fmt: skip


class Merged(InPlace):
    """Codes of a QuantWeight, INT8 or NF4, and the factor X of its part back(X): X <- (1 - lr*wd) X - change.

    In the first step on another basis the part is merged: W = codes + back(X) is quantized anew, and X begins as what of the error
    the new basis can hold. `iterations` times in turn the factor is fitted to W - codes, by least squares, and W - back(X) is
    quantized; of these pairs the one nearest to W is kept. With 0 of them X begins at zero. A merge holds three matrices of the
    weight's size in fp32.

    State of a weight: `merges`, the refreshes that its part knows of, on the host.
    """

    name = "merged"
    int8 = True

    def __init__(self, group_size, iterations):
        self.group_size, self._iterations = group_size, iterations

    def check(self, param, name):
        """Raise a ValueError for codes that are ready for fully_shard, which have no part."""
        if is_shardable(param):
            raise ValueError(f"{name} must not be made shardable for LoQT, whose low-rank part is its layer's")

    def init(self, state, index):
        state["merges"] = torch.tensor(0, device="cpu")

    def tensors(self, params):
        drop_exact(*params)
        return [p.codes for p in params], [p.scale for p in params]

    def values(self, param, first, end):
        return decoded(param)[first:end]

    def apply(self, param, state, change, *, decay, ok, seed):
        drop_exact(param)
        if low_rank_part(param) is None or state["merges"] != state["refreshes"]:
            merge(param, state, self._iterations)
            state["merges"].copy_(state["refreshes"])
        factor = low_rank_part(param).factor
        new = (factor if decay is None else decay * factor) - change.low_rank
        factor.copy_(torch.where(ok, new, factor))


IN_PLACE, STOCHASTIC = InPlace(), Stochastic()


def weight_store(param, group=None):
    """The store that a parameter of a group is kept in; without the group, how it lies in memory."""
    if is_quantized(param):
        size = rows_here(param).group_size
        return Merged(size, group["compensation"]) if group and "compensation" in group else Int8(size)
    return STOCHASTIC if group is not None and group.get("stochastic_rounding") else IN_PLACE
