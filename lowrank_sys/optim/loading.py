"""Whether a state that is to be loaded is one that this optimizer would have made, and how it is put in its place."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_sys.optim.coefficient import with_coefficients
from lowrank_sys.optim.group_checks import check_parts
from lowrank_sys.optim.names import name_of, names_of
from lowrank_sys.optim.older_states import with_blocks_by_row, with_numbers, with_rounding
from lowrank_sys.optim.shards import here, on_the_right, states_here, whole_states
from lowrank_sys.optim.states import state_maker
from lowrank_sys.schedule.roles import TRAINED
from lowrank_sys.subspace.matrices import count, each, is_batch

# What may be there or not: the norm that per_layer='in_backward' clips by, and what a GPU says of its last choice of a basis.
OPTIONAL = {"norm", "missed"}
# What stays of a run with stochastic rounding where it is off now.
UNREAD = {"parameter"}


def ready_to_load(optimizer, state_dict):
    """`state_dict`, which stays as it is, as torch's load_state_dict takes it: with what this optimizer's groups and states have
    here and now. ValueError for one of another optimizer, before anything is written."""
    optimizer.gradients.check_loaded(state_dict["param_groups"])
    state_dict = with_coefficients(optimizer, state_dict)
    check_groups(optimizer, state_dict["param_groups"])
    groups = on_the_right(optimizer, with_rounding(optimizer, state_dict["param_groups"]))
    groups = [_completed(optimizer, g, saved) for g, saved in enumerate(groups)]
    own = list(_own(optimizer, groups))
    roles = optimizer.turns.roles(
        [{**saved, "params": group["params"]} for group, saved in zip(optimizer.param_groups, groups)],
        names_of(optimizer.param_groups),
    )
    new_state = state_maker(optimizer, lambda param: roles.get(param, TRAINED))
    states = with_blocks_by_row(optimizer.pipeline, whole_states(optimizer, state_dict["state"], own), own)
    states = with_numbers(states_here(optimizer, states, own), own, new_state)
    saved = {param: states.get(i, {}) for i, _, param in own}
    for _, group, param in own:
        if "rank" in group and saved[param] and not _fits(optimizer, param, saved[param]):
            raise ValueError(
                f"the state's basis of shape {tuple(saved[param]['basis'].shape)} does not fit a parameter of shape "
                f"{tuple(param.shape)}"
            )
    check_ranks(optimizer, groups)
    check_state(optimizer, saved, [(group, param) for _, group, param in own], new_state)
    return {**state_dict, "param_groups": groups, "state": states}


def in_own_dtypes(optimizer, ready):
    """Put the values of what `ready_to_load` gave where torch's load_state_dict has cast them, letters of a string included."""
    for i, _, param in _own(optimizer, ready["param_groups"]):
        for key, value in ready["state"].get(i, {}).items():
            if isinstance(value, torch.Tensor):
                value = optimizer.pipeline.subspace.placed(key, value, param.device)
            optimizer.state[param][key] = value


def _own(optimizer, groups):
    """Yield (index in a state_dict, its group there, parameter) of this optimizer's parameters."""
    pairs = [(i, group) for group in groups for i in group["params"]]
    for (i, group), param in zip(pairs, (param for group in optimizer.param_groups for param in group["params"])):
        yield i, group, param


def _completed(optimizer, g, saved):
    """A loaded group with the keys that an older checkpoint lacks; ValueError for one that the parts cannot serve."""
    group = optimizer.completed(saved)
    if "rank" in group:
        try:
            check_parts(optimizer, {**group, "params": []}, [])
        except ValueError as error:
            raise ValueError(f"the loaded group {g}: {error}") from None
    return group


def _fits(optimizer, param, state):
    """Whether the bases of a loaded state are those of a weight like this."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    param = here(optimizer, param, param)
    size = count(param.shape)
    if is_batch(param.shape) and any(tensor.dim() == 0 or len(tensor) != size for tensor in tensors):
        return False
    return all(optimizer.pipeline.subspace.fits(matrix, one) for matrix, _, one in each(param, None, state))


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
