"""Adam with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022)."""

import torch

from lowrank_sys._ops.blockwise import blocks
from lowrank_sys.optim.inner import Adam
from lowrank_sys.optim.store import weight_store
from lowrank_sys.subspace.basis import alike, parts, store_of

# Moments of fewer elements stay in fp32, as in bitsandbytes.
MIN_8BIT_SIZE = 4096
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


class Adam8bit:
    """AdamW in torch.optim.AdamW's order on moments as codes: `exp_avg`, `exp_avg_sq` uint8 and one fp32 absmax a block each.

    Moments of fewer than the group's `min_8bit_size` elements stay in fp32, as in bitsandbytes; those of INT8 weights do not.
    """

    transports = ("keep", "reset", "rotate")
    categories = {**Adam.categories, "exp_avg_absmax": "scales", "exp_avg_sq_absmax": "scales"}
    int4_basis = int8_weights = True

    def __init__(self):
        self._full = Adam()

    def init(self, state, shape, param, group):
        if torch.Size(shape).numel() < group["min_8bit_size"] and not weight_store(param).int8:
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
        if weight_store(params[0]).int8:
            self._int8("qgalore_step", group, params, grads, states, lr, left, guards)
            return
        self._low_rank("galore_step_8bit", self._full.low_rank_step, group, params, grads, states, lr, left, guards)

    def subspace_step(self, group, params, low_rank_grads, states, lr, left, guards):
        """low_rank_step from R."""
        if weight_store(params[0]).int8:
            self._int8("qgalore_subspace_step", group, params, low_rank_grads, states, lr, left, guards)
            return
        self._low_rank("subspace_step_8bit", self._full.subspace_step, group, params, low_rank_grads, states, lr, left, guards)

    def _low_rank(self, name, full, group, params, gradients, states, lr, left, guards):
        for (coded, *_), states, params, gradients in alike(_kind, states, params, gradients):
            if not coded:
                full(group, params, gradients, states, lr, left, guards)
                continue
            store = store_of(states[0])
            bases = zip(*(parts(state)[1] for state in states))
            step = getattr(getattr(torch.ops.lowrank, name), store.overload)
            step(
                params,
                gradients,
                *map(list, bases),
                *_lists(states),
                lr=lr,
                scale=group["scale"],
                left=left,
                **store.options,
                **self._full.hyper(group),
                **guards,
            )

    def _int8(self, name, group, params, gradients, states, lr, left, guards):
        weights = weight_store(params[0])
        for _, states, params, gradients in alike(_kind, states, params, gradients):
            store = store_of(states[0])
            bases = [*map(list, zip(*(parts(state)[1] for state in states))), [], []][:3]
            getattr(torch.ops.lowrank, name).list(
                *weights.tensors(params),
                gradients,
                *bases,
                *_lists(states),
                lr=lr,
                scale=group["scale"],
                left=left,
                **{f"basis_{key}": value for key, value in store.options.items()},
                **weights.options(group, states),
                **self._full.hyper(group),
                **guards,
            )


class AdamPlain8bit(Adam):
    """Adam whose moments are in 8 bits in groups without a rank, and in fp32 in the others, where they are small."""

    categories = Adam8bit.categories

    def __init__(self):
        self._coded = Adam8bit()

    def init(self, state, shape, param, group):
        (super() if "rank" in group else self._coded).init(state, shape, param, group)

    def plain_step(self, group, params, grads, states, lr, guards):
        self._coded.plain_step(group, params, grads, states, lr, guards)


def _is_coded(state):
    return "exp_avg_absmax" in state


def _kind(state):
    """What states of one call of a step have in common."""
    return _is_coded(state), state.get("group_size", 0)


def _lists(states):
    return [[state[key] for state in states] for key in (*MOMENTS, "step")]
