"""Whether a state that is to be loaded is one that this optimizer would have made."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_sys.optim.names import name_of

# What may be there or not: the norm that per_layer='in_backward' clips by, and what a GPU says of its last choice of a basis.
OPTIONAL = {"norm", "missed"}


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
        if group.get("rank") != saved.get("rank"):
            raise ValueError(f"rank of the loaded group {g} must be {group['rank']}, as of this optimizer's, got {saved['rank']}")


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
        if surplus := sorted(state.keys() - want.keys() - OPTIONAL):
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
