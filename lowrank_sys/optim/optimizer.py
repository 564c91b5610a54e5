"""LowRankOptimizer: the composition that every method is a preset of."""

from collections.abc import Callable
from typing import Any

import torch

from lowrank_sys.optim import hyper, ledger
from lowrank_sys.optim.coefficient import weights, without_coefficients
from lowrank_sys.optim.configuration import expect_same
from lowrank_sys.optim.group_checks import check_parts, check_stores
from lowrank_sys.optim.loading import in_own_dtypes, ready_to_load
from lowrank_sys.optim.moments import first_of
from lowrank_sys.optim.names import name_of, names_of, with_names
from lowrank_sys.optim.per_layer import resolve
from lowrank_sys.optim.shards import here, is_dtensor, layouts_of, saved_by_row, shard_here
from lowrank_sys.optim.states import state_maker
from lowrank_sys.schedule.turns import Turns
from lowrank_sys.subspace.basis import load
from lowrank_sys.subspace.matrices import each, is_batch
from lowrank_sys.subspace.rank import resolved
from lowrank_sys.subspace.refresh import trains


def _near(number, device):
    """A 0-dim number on `device`, where the ops of its weights want it; between GPUs nothing waits."""
    return number.to(device, non_blocking=device.type != "cpu")


class LowRankOptimizer(torch.optim.Optimizer):
    """Low-rank updates for groups with a `rank`, the plain rule for the others.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Keys of a low-rank group: `rank` (a
            lowrank_sys.subspace.rank.Rank; from then on an integer, or a tuple of one for each parameter where they differ) and
            those of the parts. Of any group: `stochastic_rounding` (False; True: weights in 16 bits are rounded stochastically,
            with the random bits of the group's `seed`; fp32 weights are not).
        pipeline: the parts (lowrank_sys.optim.pipeline.Pipeline).
        defaults: `lr` (float or 0-dim tensor), and hyper-parameters of the rules in place of their own defaults.
        nonfinite: 'skip': a gradient that is not finite leaves its channel (plain groups: its element) untouched, counted
            by `skipped()`; 'raise': FloatingPointError before anything is written.
        per_layer: when the gradients of the matrices are projected (lowrank_sys.optim.per_layer). None: in step(), or 'accumulate'
            for a model of projected layers. 'accumulate' or an Accumulate: as soon as they exist. 'in_backward' or an InBackward:
            with their whole step.

    The state is tensors and plain numbers only: torch.load(weights_only=True), DCP and safetensors work, and a resumed run is
    exact to the bit.
    """

    low_rank_defaults = {}  # group keys in which a method differs from its parts
    _compared = False  # whether all processes have been seen to train alike

    # GradScaler hands over grad_scale and found_inf instead of synchronising.
    _step_supports_amp_scaling = True

    def __init__(self, params, pipeline, defaults, nonfinite="skip", per_layer=None):
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite must be 'skip' or 'raise', got {nonfinite!r}")
        self.pipeline = pipeline
        self.nonfinite = nonfinite
        self.counters = {}  # device -> how many weights were skipped there
        self.turns = Turns(pipeline.schedule)
        self.layouts = {}  # parameter whose rows lie on several processes -> where
        self.gradients = resolve(per_layer, params)
        if self.gradients.served_by_hooks:
            self.gradients.bind(self)
        super().__init__(params, {**pipeline.defaults(), **pipeline.schedule.memory, **defaults})
        self._compare()
        self.turns.take(self.param_groups, names_of(self.param_groups), self.state)
        self.gradients.ready(self)

    @property
    def rules(self):
        """What group keys may hold."""
        return {**hyper.RULES, **self.pipeline.plain.checks, **self.pipeline.rule.checks}

    def __getstate__(self):
        # torch's names three fields only: a copy would lose its parts.
        own = ("pipeline", "nonfinite", "counters", "turns", "layouts", "gradients")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "gradients" in state and self.gradients.served_by_hooks:  # a copy: its weights have no hooks yet
            self.gradients.bind(self)

    def add_param_group(self, param_group):
        before, unnamed = len(self.param_groups), [group for group in self.param_groups if "param_names" not in group]
        try:
            super().add_param_group(with_names(param_group, self.param_groups))
            group = self.param_groups[-1]
            group.setdefault("stochastic_rounding", False)
            if "lr" not in group:
                raise ValueError("lr must be in the defaults, or in every group")
            names = names_of(self.param_groups)[-1]
            hyper.check(group, self.rules)
            check_stores(self.completed(group), names)
            if "rank" in group:
                self._check_low_rank(group, names)
            self._lay_out(group, names)
            self.gradients.attach(self, group, names)
            if self.turns.begun:
                self.turns.take(self.param_groups, names_of(self.param_groups), self.state)
        except Exception:
            del self.param_groups[before:]
            for group in unnamed:
                group.pop("param_names", None)
            raise

    def _check_low_rank(self, group, names):
        self.gradients.check(self)
        self._set_defaults(group)
        hyper.check(group, self.rules)
        group["rank"] = resolved(group["rank"], names, group["params"])
        check_parts(self, group, names)

    def _lay_out(self, group, names):
        """Know where the rows of its parameters lie: of a new group, and when states are made, for Accelerate's prepare puts
        sharded parameters in the place of others."""
        if any(is_dtensor(param) and param not in self.layouts for param in group["params"]):
            self.layouts |= layouts_of(self, group, names)

    def _set_defaults(self, group):
        pipeline = self.pipeline
        parts = (pipeline.subspace.defaults, pipeline.remainder.defaults, self.gradients.defaults, self.low_rank_defaults)
        for key, value in {key: value for part in parts for key, value in part.items()}.items():
            group.setdefault(key, value)
        for key, value in pipeline.subspace.more_defaults(group).items():
            group.setdefault(key, value)

    def completed(self, group):
        """A copy of a group, which may be one of a checkpoint, with the defaults of the keys that it lacks."""
        group = dict(group)
        if "rank" in group:
            self._set_defaults(group)
        return group

    # What those who take the gradients (lowrank_sys.optim.gradients) and a captured step ask for.

    def groups_so_far(self):
        """The groups, while the optimizer is built too."""
        return self.__dict__.get("param_groups", [])

    def group_of(self, param):
        return next(group for group in self.param_groups if any(p is param for p in group["params"]))

    def state_of(self, param):
        """The state of a parameter, made if there is none yet."""
        if not self.state[param]:
            self.make_states([param])
        return self.state[param]

    def make_states(self, params):
        """Make the missing state of these parameters."""
        missing = {p for p in params if not self.state[p]}
        if missing:
            self._lay_out_all()
            new_state = state_maker(self, self.turns.role)
            for group in self.param_groups:
                for param in group["params"]:
                    if param in missing:
                        self.state[param] = new_state(param, group)

    def _lay_out_all(self):
        for g, group in enumerate(self.param_groups):
            self._lay_out(group, [name_of(group, g, i) for i in range(len(group["params"]))])

    def counter(self, device):
        """How many weights were skipped on a device, int64."""
        if device not in self.counters:
            self.counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self.counters[device]

    def scaler(self):
        """(grad_scale, found_inf) of a GradScaler, None without one."""
        return self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")

    def rate(self, group, device=None):
        """The rate as a 0-dim tensor; 1 where it is relative to the step. device: of the weights, for a rate on another GPU."""
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            return lr if device is None or lr.is_cpu else _near(lr, device)
        return torch.tensor(1.0 if lr is None else lr, dtype=torch.float32, device="cpu")

    def batches(self, group, pairs, grad_scale=None, found_inf=None, projected=False):
        """Batches (lowrank_sys.optim.pipeline.Batch) of (parameter, gradient). grad_scale, found_inf: a GradScaler's."""
        triples = []
        for param, grad in pairs:
            if grad.is_sparse:
                raise ValueError(f"gradients must be dense, got a sparse one of shape {tuple(grad.shape)}")
            state = self.state[param] or self.state_of(param)
            if self.layouts and param in self.layouts:
                layout = self.layouts[param]
                param, grad = layout.local(param), layout.local(grad)
            if param.dim() == 2 or "rank" not in group:
                triples.append((param, grad, state))
            else:
                self.gradients.complete(state, param)
                triples += each(param, grad, state)
        if grad_scale is not None:
            grad_scale = grad_scale.reciprocal()  # GradScaler's factor divides, the ops' one multiplies

        def guards(device):
            scale, inf = (None if number is None else _near(number, device) for number in (grad_scale, found_inf))
            return {"grad_scale": scale, "found_inf": inf, "skipped": self.counter(device)}

        return self.pipeline.batches(group, triples, guards, projected)

    def all_batches(self, grad_scale=None, found_inf=None):
        """Yield (group, batch) of all that has a gradient."""
        for group in self.param_groups:
            for batch in self.batches(group, self._pairs(group), grad_scale, found_inf, self.gradients.projected):
                yield group, batch

    def _pairs(self, group):
        """[(parameter, gradient)] of what trains now and has one."""
        pairs = self.gradients.of(group)
        return pairs if self.pipeline.schedule.static else [(p, grad) for p, grad in pairs if self.turns.trains(p)]

    def expect_finite(self, param, grad):
        """With nonfinite='raise' a FloatingPointError that names a parameter whose gradient is not finite."""
        if self.nonfinite == "raise" and not self._is_finite(param, grad):
            for g, group in enumerate(self.param_groups):
                for i, other in enumerate(group["params"]):
                    if other is param:
                        raise FloatingPointError(f"the gradient of {name_of(group, g, i)} is not finite")

    def _is_finite(self, param, grad):
        return not shard_here(self, param).any(~here(self, param, grad).isfinite().all())

    def _compare(self):
        """Once there are several processes: raise a RuntimeError on all of them if one trains otherwise."""
        if not self._compared and self.gradients.world.size > 1:
            expect_same(self)
            self._compared = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # handles of quantized weights and coefficients are asked what they are, not what they stand for
        with torch._C.DisableTorchFunctionSubclass():
            self._compare()
            self.gradients.begin(self)
            for group in self.param_groups if self.nonfinite == "raise" else ():
                for param, grad in self._pairs(group):
                    self.expect_finite(param, grad)
            self.make_states([param for group in self.param_groups for param, _ in self._pairs(group)])
            for group, batch in self.all_batches(*self.scaler()):
                self.gradients.step(self, batch, self.rate(group, batch.params[0].device))
            self.gradients.finish(self)
            if not self.pipeline.schedule.static and any(trains(self.rate(group)) for group in self.param_groups):
                self.turns.advance(self.param_groups, names_of(self.param_groups), self.state)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, accumulated low-rank ones included."""
        super().zero_grad(set_to_none)
        self.gradients.zero()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that the norm of the low-rank and the plain ones is at most `max_norm`; returns it, 0-dim.

        At most the full gradient's norm, for |R| <= |G|. A gradient that is not finite does not count and does not spread.
        With per_layer='accumulate' the same as torch's clip_grad_norm_ over the model's parameters; with dense gradients it
        needs refresh='next' and costs a projection of each.
        """
        return self.gradients.clip(self, max_norm)

    def release(self) -> None:
        """Give the weights back: removes what per_layer put on them and into the model, and thaws them. The optimizer is done."""
        self.gradients.release(self)
        self.turns.release()

    def skipped(self) -> int:
        """Weight elements left untouched so far because their gradient was not finite. Reads the device."""
        return sum(int(counter) for counter in self.counters.values())

    def refreshes(self) -> dict[str, dict[str, Any]]:
        """The refresh schedule of every matrix, by name: {"countdown": steps until its next refresh}.

        Where its gap is its own (cos_threshold): also "gap", and "overlaps", those of its last bases with their predecessors,
        oldest first. Reads the device.
        """
        schedule, describe = {}, self.pipeline.subspace.describe
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(weights(group)):
                state, name = self.state.get(param, {}), name_of(group, g, i)
                if "countdown" in state:
                    found = [describe(one) for _, _, one in each(here(self, param, param), None, state)]
                    first = shard_here(self, param).first
                    names = [f"{name}[{first + e}]" for e in range(len(found))] if is_batch(param.shape) else [name]
                    schedule.update(zip(names, found))
        return schedule

    def keeps_first_moment(self, group: dict[str, Any]) -> bool:
        """Whether states of this group's parameters have a first moment of R's shape, or of the gradient's."""
        return any(moment.signed and moment.axis is None for moment in self.pipeline.moments_of(group, (1, 1)).values())

    @torch.no_grad()
    def first_moment(self, param: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The first moment of a matrix (m, n), fp32, of a rule that keeps one: as it is, (M,), or where it is of R's shape the
        factors of back(M), (B, M) or (M, Bᵀ)."""
        state, group = self.state_of(param), self.group_of(param)
        moment = first_of(state, self.pipeline.moments_of(group, self.pipeline.subspace.shape_of(param, state)))
        if self.pipeline.subspace.is_whole(state):
            return (moment,)
        basis = load(state, param).float()
        return (basis, moment) if state["left"] else (moment, basis.T)

    def state_bytes(self) -> int:
        """Bytes of the state as the ledger has them, and of the accumulators of per_layer='accumulate' when they are full."""
        return ledger.state_bytes(self) + sum(self.gradients.memory().values())

    def memory(self) -> dict[str, int]:
        """Bytes held now by category (weights, gradients, basis, moments, scales, accumulators, counters, other), and `total`.

        Counts distinct storages, so memory that tensors share counts once. See lowrank_sys.optim.ledger.
        """
        return ledger.memory(self)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a checkpoint has no coefficients and no gradients, so it is the same whatever per_layer is.

        What the state of a sharded weight has by rows are DTensors (docs/fsdp.md).
        """
        return saved_by_row(self, without_coefficients(self, super().state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in its own dtypes: torch's casts every tensor but `step` to the parameter's dtype.

        With per_layer='accumulate', gradients accumulated so far are dropped.
        """
        self._lay_out_all()
        ready = ready_to_load(self, state_dict)
        super().load_state_dict(ready)
        in_own_dtypes(self, ready)
        self.turns.loaded(self.param_groups, names_of(self.param_groups), self.state)
        self.gradients.loaded(self)
