"""Parameters whose rows lie on several processes, DTensors as fully_shard makes them: all parts see the rows that are here.

The state of an optimizer holds plain tensors, of these rows. A state_dict has them as DTensors of the parameter's mesh and
placements, and as it is what belongs to the whole matrix (a basis, a schedule, a step), which is equal on all processes.
"""

import sys
from math import prod

import torch

from lowrank_sys._ops.blockwise import BLOCK
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.subspace.kind import NUMBERS
from lowrank_sys.subspace.matrices import is_batch
from lowrank_sys.subspace.moments import absmax_of
from lowrank_sys.subspace.shards import KEYS, WHOLE, Shard


def is_dtensor(value):
    module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it, nothing is one
    return module is not None and isinstance(value, module.DTensor)


def whole(value):
    """A value of a state_dict; a DTensor as a tensor of all rows."""
    return value.full_tensor() if is_dtensor(value) else value


class Layout:
    """Where the rows of a DTensor parameter lie: Shard(0) over one dimension of its mesh and Replicate over the others, or
    replicated over all. Shards may be uneven, and without rows.

    shape: of the whole. first, count: of the rows here, or of the experts: of a weight (E, m, n) whole matrices are here and there.
    shard: the same as a Shard. numbers: what a state has of it (lowrank_sys.subspace.shards.KEYS), {} where no row is elsewhere.
    """

    def __init__(self, param, name, experts=False):
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Split

        self.mesh, self.placements, self.shape = param.device_mesh, tuple(param.placements), tuple(param.shape)
        split = [i for i, placement in enumerate(self.placements) if type(placement) is not Replicate]
        if len(split) > 1 or any(type(self.placements[i]) is not Split or self.placements[i].dim != 0 for i in split):
            raise ValueError(
                f"{name} must have the placement Shard(0) over one dimension of its mesh and Replicate over the others, got "
                f"{', '.join(map(repr, self.placements))}"
            )
        self.first, self.count, self.shard = 0, self.shape[0] if self.shape else 1, WHOLE
        self.experts, self.numbers = experts, {}
        if split:
            rank, size, rows = self.mesh.get_local_rank(split[0]), self.mesh.size(split[0]), self.shape[0]
            piece = -(-rows // size)  # as torch.chunk's
            self.first = min(rank * piece, rows)
            self.count = min(piece, rows - self.first)
            self.shard = Shard(self.first, rows, self.mesh.get_group(split[0]).group_name)
            if experts and (size - 1) * piece >= rows:
                raise ValueError(f"{name} must have an expert on each of {size} processes, got {rows} of {piece} on each")
            if not experts:
                self.numbers = dict(zip(KEYS, (self.first * self.row, rows, self.shard.group)))

    @property
    def row(self):
        """Elements of a row."""
        return prod(self.shape[1:])

    def local(self, tensor):
        """The rows here of the parameter, or of its gradient, in its own memory."""
        if tensor.placements != self.placements:
            tensor = tensor.redistribute(self.mesh, self.placements)
        return tensor.to_local()

    def saved(self, state, by_row):
        """A state as a state_dict has it. by_row: {name of what has a row for each of the parameter's: whether it is kept flat}."""
        from torch.distributed.tensor import DTensor

        left_out = NUMBERS if self.experts else KEYS
        saved = {key: value for key, value in state.items() if key not in left_out}
        for key in by_row.keys() & saved.keys():
            value = saved[key].view(self.count, self.row // BLOCK) if by_row[key] else saved[key]
            value = value.to(self.mesh.device_type)  # the schedule of experts is on the host
            shape = torch.Size((self.shape[0], *value.shape[1:]))
            stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
            saved[key] = DTensor.from_local(value, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)
        return saved

    def loaded(self, state, by_row):
        """The rows here of a state of a state_dict, which has them in DTensors of any mesh or in tensors of all rows."""
        return {
            key: self._rows_here(value, by_row[key]) if key in by_row else whole(value)
            for key, value in state.items()
            if not (self.experts and key in NUMBERS)
        }

    def _rows_here(self, value, flat):
        if is_dtensor(value) and (value.device_mesh, tuple(value.placements)) == (self.mesh, self.placements):
            value = value.detach().to_local()
        else:
            value = whole(value)
            if flat and value.dim() == 1 and len(value) == self.shape[0] * (self.row // BLOCK):
                value = value.view(self.shape[0], -1)
            if value.dim() and len(value) == self.shape[0]:
                value = value[self.first : self.first + self.count].clone()
        return value.flatten() if flat else value


def sharded(layout):
    """Whether a parameter with this Layout, or None, has rows or experts on other processes."""
    return layout is not None and layout.shard.group != ""


def in_rows(layout):
    """Whether it has rows of its matrices on other processes."""
    return layout is not None and layout.numbers != {}


def here(optimizer, param, tensor):
    """The rows that are here of a parameter, or of its gradient."""
    return optimizer.layouts[param].local(tensor) if param in optimizer.layouts else tensor


def shard_here(optimizer, param):
    """The lowrank_sys.subspace.shards.Shard that they are."""
    return optimizer.layouts[param].shard if param in optimizer.layouts else WHOLE


def experts_here(optimizer, param):
    """Whether they are some experts of those of a weight."""
    return param in optimizer.layouts and optimizer.layouts[param].experts and sharded(optimizer.layouts[param])


def over_shards(norms, shards):
    """Norms (k,) of whole tensors from those of the k shards that are here."""
    norms = norms.clone()
    for group in dict.fromkeys(shard.group for shard in shards if shard.group):
        which = [i for i, shard in enumerate(shards) if shard.group == group]
        norms[which] = shards[which[0]].norms(norms[which])
    return norms


def layouts_of(optimizer, group, names):
    """{parameter: Layout} of the DTensors in a new group, whose bases go to the right; names of its parameters. ValueError
    for what they are not served with."""
    layouts = {
        param: Layout(param, name, experts="rank" in group and is_batch(param.shape))
        for name, param in zip(names, group["params"])
        if is_dtensor(param)
    }
    if not optimizer.gradients.sharded and any(map(sharded, layouts.values())):
        raise ValueError("per_layer must be None or 'in_backward' for sharded weights")
    if not any(map(in_rows, layouts.values())):
        return layouts
    if group.get("proj_type") == "left":
        raise ValueError("proj_type must be right for sharded weights, of which rows stay where they are, got 'left'")
    if "proj_type" in group:
        group["proj_type"] = "right"
    optimizer.pipeline.check_sharded(group)
    return layouts


def on_the_right(optimizer, saved_groups):
    """Groups of a state_dict with the bases of sharded weights on the right."""

    turned = [
        {**saved, "proj_type": "right"}
        if "proj_type" in saved and any(in_rows(optimizer.layouts.get(param)) for param in group["params"])
        else saved
        for group, saved in zip(optimizer.param_groups, saved_groups)
    ]
    return [*turned, *saved_groups[len(turned) :]]


def saved_by_row(optimizer, state_dict):
    """A state_dict in which what a state has by rows are DTensors."""
    if not optimizer.layouts:
        return state_dict
    ids = (i for group in state_dict["param_groups"] for i in group["params"])
    states = dict(state_dict["state"])
    for i, (group, param) in zip(ids, ((group, param) for group in optimizer.param_groups for param in weights(group))):
        layout = optimizer.layouts.get(param)
        if sharded(layout) and states.get(i):
            states[i] = layout.saved(states[i], _by_row(optimizer.pipeline, layout, states[i], group, param))
    return {**state_dict, "state": states}


def _by_row(pipeline, layout, state, group, param):
    """{name in a state of a sharded weight: whether it is kept flat} of what has a row for each of its rows or experts."""
    if layout.experts:
        return {key: False for key, value in state.items() if isinstance(value, torch.Tensor)}
    return pipeline.by_row(group, param.shape)


def whole_states(optimizer, states, params):
    """States of a state_dict in which weights that are not sharded have no DTensors. params: [(index, group, parameter)]."""
    states, pipeline = dict(states), optimizer.pipeline
    for i, group, param in params:
        state = states.get(i, {})
        if sharded(optimizer.layouts.get(param)) or not any(map(is_dtensor, state.values())):
            continue
        state = {key: whole(value) for key, value in state.items()}
        flat = {key for key, kept_flat in pipeline.by_row(group, param.shape).items() if kept_flat and key in state}
        state |= {key: state[key].flatten() for key in flat}
        states[i] = _recoded(pipeline, state, group, param, to_codes=True)
    return states


def states_here(optimizer, states, params):
    """States of a state_dict with the rows that are here. params: [(index, group, parameter)] with the keys of the loaded group."""
    states, pipeline = dict(states), optimizer.pipeline
    for i, group, param in params:
        layout = optimizer.layouts.get(param)
        if not sharded(layout) or not states.get(i):
            continue
        if layout.numbers and states[i].get("left"):
            raise ValueError("the loaded state has bases on the left, sharded weights go on with those of proj_type='right'")
        state = _recoded(pipeline, states[i], group, param, to_codes=False)
        states[i] = {**layout.loaded(state, _by_row(pipeline, layout, state, group, param)), **layout.numbers}
    return states


def _recoded(pipeline, state, group, param, *, to_codes):
    """A state with the plain moments that are codes of a whole weight and fp32 of its shards, as the one or the other."""
    shape, coded = tuple(param.shape), pipeline.moments.codes
    if "rank" in group or not coded(shape, param, group) or coded(shape, param, group, rows=shape[0]):
        return state
    state = dict(state)
    for name, moment in pipeline.moments_of(group, shape).items():
        if to_codes and absmax_of(name) not in state:
            stored = torch.ops.lowrank.quantize_blockwise(state[name], signed=moment.signed)
            state[name], state[absmax_of(name)] = stored
        elif not to_codes and absmax_of(name) in state:
            absmax = state.pop(absmax_of(name))
            state[name] = torch.ops.lowrank.dequantize_blockwise(state[name], absmax, signed=moment.signed)
    return state
