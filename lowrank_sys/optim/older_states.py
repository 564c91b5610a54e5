"""States as older versions saved them, and those of a run with other settings, become such as this optimizer makes."""

import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_sys._ops.blockwise import BLOCK, absmax_shape
from lowrank_sys.subspace.kind import NUMBERS
from lowrank_sys.subspace.matrices import is_batch, matrices
from lowrank_sys.subspace.moments import absmax_of


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
            stacklevel=4,
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
