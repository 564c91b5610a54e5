"""Adam with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022)."""

import torch

from lowrank_sys._ops.blockwise import blocks
from lowrank_sys.optim.inner import Adam
from lowrank_sys.subspace.basis import alike, parts, store_of

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


class Adam8bit:
    """AdamW in torch.optim.AdamW's order on moments as codes: `exp_avg`, `exp_avg_sq` uint8 and one fp32 absmax a block each.

    Moments of fewer than the group's `min_8bit_size` elements stay in fp32, as in bitsandbytes.
    """

    transports = ("keep", "reset", "rotate")
    categories = {**Adam.categories, "exp_avg_absmax": "scales", "exp_avg_sq_absmax": "scales"}
    int4_basis = True

    def __init__(self):
        self._full = Adam()

    def init(self, state, shape, param, group):
        if torch.Size(shape).numel() < group["min_8bit_size"]:
            self._full.init(state, shape, param, group)
            return
        for key in MOMENTS[:2]:
            state[key] = torch.zeros(shape, dtype=torch.uint8, device=param.device)
        for key in MOMENTS[2:]:  # blocks of zeros, whatever their codes
            state[key] = torch.zeros(blocks(shape), dtype=torch.float32, device=param.device)

    def plain_step(self, group, params, grads, states, lr, guards):
        for coded, states, params, grads in alike(_is_coded, states, params, grads):
            if coded:
                torch.ops.lowrank.adam_8bit_(params, grads, *_lists(states), lr=lr, **self._full.hyper(group), **guards)
            else:
                self._full.plain_step(group, params, grads, states, lr, guards)

    def low_rank_step(self, group, params, grads, states, lr, left, guards):
        self._low_rank("galore_step_8bit", self._full.low_rank_step, group, params, grads, states, lr, left, guards)

    def subspace_step(self, group, params, low_rank_grads, states, lr, left, guards):
        """low_rank_step from R."""
        self._low_rank("subspace_step_8bit", self._full.subspace_step, group, params, low_rank_grads, states, lr, left, guards)

    def _low_rank(self, name, full, group, params, gradients, states, lr, left, guards):
        for (coded, *_), states, params, gradients in alike(_kind, states, params, gradients):
            if not coded:
                full(group, params, gradients, states, lr, left, guards)
                continue
            store = store_of(states[0])
            bases = zip(*(parts(state)[1] for state in states))
            step = getattr(getattr(torch.ops.lowrank, name), store.overload)
            step(params, gradients, *map(list, bases), *_lists(states), lr=lr, scale=group["scale"], left=left,
                 **store.options, **self._full.hyper(group), **guards)


def _is_coded(state):
    return "exp_avg_absmax" in state


def _kind(state):
    """What states of one call of a step have in common."""
    return _is_coded(state), state.get("group_size", 0)


def _lists(states):
    return [[state[key] for state in states] for key in (*MOMENTS, "step")]
