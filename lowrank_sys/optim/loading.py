"""Whether a state that is to be loaded is one that this optimizer would have made, and how older ones become so."""

import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_sys._ops.blockwise import BLOCK, absmax_shape
from lowrank_sys.optim.names import name_of
from lowrank_sys.subspace.kind import NUMBERS
from lowrank_sys.subspace.matrices import is_batch, matrices
from lowrank_sys.subspace.moments import absmax_of

# What may be there or not: the norm that per_layer='in_backward' clips by, and what a GPU says of its last choice of a basis.
OPTIONAL = {"norm", "missed"}
# What stays of a run with stochastic rounding where it is off now.
UNREAD = {"parameter"}


def check_groups(optimizer, saved_groups):
    """Every group keeps its kind: with a rank or plain, and with the hyper-parameters of this rule."""
    pairs = list(enumerate(zip(optimizer.param_groups, saved_groups)))
    for g, (group, saved) in pairs:
        if ("rank" in group) != ("rank" in saved):
            raise ValueError(
                f"the loaded group {g} must {'have' if 'rank' in group else 'not have'} the key 'rank', as group {g} of "
                f"this {type(optimizer).__name__}: it is a state of another optimizer"
            )
    for g, (_, saved) in pairs:
        if lacking := sorted((optimizer.defaults.keys() & optimizer.rules.keys()) - saved.keys()):
            raise ValueError(
                f"the loaded group {g} must have the keys of {type(optimizer).__name__}, it lacks {', '.join(lacking)}"
            )


def check_ranks(optimizer, saved_groups):
    """Every group keeps its own rank."""
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups)):
        rank = saved.get("rank")
        if group.get("rank") != (tuple(rank) if isinstance(rank, list) else rank):
            raise ValueError(f"rank of the loaded group {g} must be {group['rank']}, as of this optimizer's, got {rank}")


def with_blocks_by_row(pipeline, states, params):
    """`states` with the 8-bit moments of low-rank gradients in blocks by row, or in fp32 where their rows are short.

    states: {index: state} as saved, which stays as it is, with blocks by row or flat over R, as older versions have them; params:
    (index, group, parameter) with the keys of the loaded group. One warning says how many moments were rounded again, or widened.
    """
    states, count = dict(states), 0
    for i, group, param in params:
        if "rank" not in group or not states.get(i):
            continue
        state = states[i] = dict(states[i])
        for name, signed in list(_flat_moments(pipeline, state, group)):
            codes, absmax = state[name], state.pop(absmax_of(name))
            coded = pipeline.moments.codes(codes.shape[-2:], param, group)
            if coded and codes.shape[-1] % BLOCK == 0:  # no block crosses a row
                state[absmax_of(name)] = absmax.reshape(absmax_shape(codes.shape, by_row=True))
                continue
            count += 1
            state[name] = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
            for r, *flat in zip(matrices(state[name]), matrices(codes), [absmax] if absmax.dim() == 1 else absmax):
                r.copy_(torch.ops.lowrank.dequantize_blockwise(*flat, signed=signed))
            if coded:
                stored = torch.ops.lowrank.quantize_blockwise(state[name], signed=signed, by_row=True)
                state[name], state[absmax_of(name)] = stored
    if count:
        warnings.warn(
            f"{count} 8-bit moments of the loaded state are in blocks that cross rows of the low-rank gradient, as older versions "
            "kept them: they were decoded and encoded again, once, in blocks of one row, or are fp32 now where rows are short",
            stacklevel=3,
        )
    return states


def with_rounding(optimizer, saved_groups):
    """`saved_groups` with `stochastic_rounding`, which older versions do not have: as this optimizer's groups have it."""
    own = [group.get("stochastic_rounding", False) for group in optimizer.param_groups]
    own += [False] * (len(saved_groups) - len(own))
    return [{"stochastic_rounding": mine, **saved} for mine, saved in zip(own, saved_groups)]


def with_numbers(states, params, new_state):
    """`states` with the number of the weight wherever stochastic rounding asks for it: those of a run without have none. And with
    all numbers of experts, which differ from one to the next: a state_dict of sharded ones has none.

    states, params: as in with_blocks_by_row; new_state(param, group) makes a state.
    """
    states = dict(states)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for i, group, param in params:
            rounded = group.get("stochastic_rounding") and "parameter" not in states.get(i, ())
            experts = "rank" in group and is_batch(param.shape) and not states.get(i, {}).keys() & set(NUMBERS)
            if states.get(i) and (rounded or experts):
                made = new_state(param, group)
                states[i] = {**{key: made[key] for key in NUMBERS if key in made}, **states[i]}
    return states


def _flat_moments(pipeline, state, group):
    """(name, signed) of the moments of R's shape, or of a stack of them, whose blocks are flat over each R."""
    for name, moment in pipeline.moments_of(group, (1, 1)).items() if pipeline.moments.low_rank else ():
        codes, absmax = state.get(name), state.get(absmax_of(name))
        if moment.axis is None and all(isinstance(tensor, torch.Tensor) for tensor in (codes, absmax)) and codes.dim() > 1:
            flat = (*codes.shape[:-2], *absmax_shape(codes.shape[-2:], by_row=False))
            if (codes.dtype, absmax.dtype, absmax.shape) == (torch.uint8, torch.float32, flat):
                yield name, moment.signed


def check_state(optimizer, saved, params, new_state):
    """Every parameter's state has the keys, and its tensors the kinds and shapes, of one that `new_state(param, group)` makes.

    saved: {parameter: its loaded state}; params: (group, parameter) with the keys of the loaded group. Nothing is allocated.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        wanted = {param: new_state(param, group) for group, param in params if saved.get(param)}
    names = {
        param: name_of(group, g, i) for g, group in enumerate(optimizer.param_groups) for i, param in enumerate(group["params"])
    }
    for param, want in wanted.items():
        state, where = saved[param], f"the loaded state of {names[param]}"
        if lacking := sorted(want.keys() - state.keys() - OPTIONAL):
            raise ValueError(f"{where} must have what {type(optimizer).__name__} keeps, it lacks {', '.join(lacking)}")
        if surplus := sorted(state.keys() - want.keys() - OPTIONAL - UNREAD):
            raise ValueError(f"{where} must have what {type(optimizer).__name__} keeps, it has {', '.join(surplus)} too")
        for key, value in want.items():
            if key in state and isinstance(value, torch.Tensor) and not _alike(value, state[key]):
                raise ValueError(f"{where}: {key} must be {_spell(value)}, got {_spell(state[key])}")


def _alike(want, got):
    """Floats may have another width, as where a bf16 model takes up an fp32 one's basis."""
    return (
        isinstance(got, torch.Tensor)
        and got.shape == want.shape
        and (got.dtype == want.dtype or got.is_floating_point() and want.is_floating_point())
    )


def _spell(value):
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
