"""LowRankOptimizer: the composition that every method is a preset of."""

from functools import partial

import torch

from lowrank_sys.memory import ledger
from lowrank_sys.optim import hyper
from lowrank_sys.optim.coefficient import weights, with_coefficients, without_coefficients
from lowrank_sys.optim.loading import check_groups, check_ranks, check_state
from lowrank_sys.optim.names import default_names, name_of, with_names
from lowrank_sys.optim.per_layer import resolve
from lowrank_sys.optim.residual import Dropped
from lowrank_sys.optim.store import by_rows, put_back, weight_store
from lowrank_sys.subspace.subspace import Subspace


class LowRankOptimizer(torch.optim.Optimizer):
    """Low-rank updates for groups with a `rank`, the plain inner rule for the others.

    Composed of a subspace part (select, store, refresh, transport), an inner rule on the low-rank state, a residual (what
    happens to G - back(R)) and a store (how weights are kept).

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Keys of a low-rank group: `rank` and
            those of the subspace and the residual.
        inner: the inner rule (lowrank_sys.optim.inner).
        defaults: the rule's hyper-parameters, with `lr` (float or 0-dim tensor).
        nonfinite: 'skip': a gradient that is not finite leaves its channel (plain groups: its element) untouched, counted
            by `skipped()`; 'raise': FloatingPointError before anything is written.
        per_layer: when the gradients of the matrices are projected (lowrank_sys.optim.per_layer). None: in step().
            'accumulate' or an Accumulate: as soon as they exist. 'in_backward' or an InBackward: with their whole step.
        subspace: Subspace() by default, an orthonormal basis in memory (lowrank_sys.subspace).
        residual: Dropped() by default, GaLore's (lowrank_sys.optim.residual).

    The state is tensors and plain numbers only: torch.load(weights_only=True), DCP and safetensors work, and a resumed run is
    exact to the bit.
    """

    low_rank_defaults = {}  # group keys in which a method differs from its parts
    rules = hyper.RULES  # what group keys may hold

    # GradScaler hands over grad_scale and found_inf instead of synchronising.
    _step_supports_amp_scaling = True

    def __init__(self, params, inner, defaults, nonfinite="skip", per_layer=None, *, subspace=None, residual=None):
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f"nonfinite must be 'skip' or 'raise', got {nonfinite!r}")
        self.inner = inner
        self.subspace = Subspace() if subspace is None else subspace
        self.residual = Dropped() if residual is None else residual
        self.nonfinite = nonfinite
        self._counters = {}
        self.gradients = resolve(per_layer, params)
        if self.gradients.served_by_hooks:
            self.gradients.bind(self)
        super().__init__(params, defaults)

    def __getstate__(self):
        # torch's names three fields only: a copy would lose its parts.
        return {
            **super().__getstate__(),
            "inner": self.inner,
            "subspace": self.subspace,
            "residual": self.residual,
            "nonfinite": self.nonfinite,
            "_counters": self._counters,
            "gradients": self.gradients,
        }

    def __setstate__(self, state):
        super().__setstate__(state)
        if "gradients" in state and self.gradients.served_by_hooks:  # a copy: its weights have no hooks yet
            self.gradients.bind(self)

    def add_param_group(self, param_group):
        before, unnamed = len(self.param_groups), [group for group in self.param_groups if "param_names" not in group]
        try:
            super().add_param_group(with_names(param_group, self.param_groups))
            group = self.param_groups[-1]
            names = group.get("param_names") or default_names(self.param_groups[:-1], len(group["params"]))
            hyper.check(group, self.rules)
            self._check_stores(group, names)
            if "rank" in group:
                self._check_low_rank(group, names)
            self.gradients.attach(self, group, names)
        except Exception:
            del self.param_groups[before:]
            for group in unnamed:
                group.pop("param_names", None)
            raise

    def _check_stores(self, group, names):
        for name, param in zip(names, group["params"]):
            store = weight_store(param)
            store.check(param, name)
            if store.int8 and "rank" not in group:
                raise ValueError(f"{name} is an INT8 weight, which trains in a group with a rank only")

    def _check_low_rank(self, group, names):
        self.gradients.check(self)
        self._set_defaults(group)
        hyper.check(group, self.rules)
        for key, part in (("quant", "int4_basis"), ("int8_gemm", "int8_gemm")):
            if group.get(key) and not self._serves(key, part):
                raise ValueError(f"{key} must be False for {type(self).__name__}, got {group[key]!r}")
        self.subspace.check(group, names)
        self.residual.check(group)
        if group["moments"] not in self.inner.transports:
            raise ValueError(
                f"moments must be one of {', '.join(self.inner.transports)} for {type(self.inner).__name__}, "
                f"got {group['moments']!r}"
            )

    def _serves(self, key, flag):
        """Whether all parts can do what a group key of the subspace asks for."""
        return key in self.subspace.defaults and all(getattr(part, flag, False) for part in (self.inner, self.residual))

    def _set_defaults(self, group):
        parts = (self.subspace.defaults, self.residual.defaults, self.gradients.defaults, self.low_rank_defaults)
        for key, value in {key: value for part in parts for key, value in part.items()}.items():
            group.setdefault(key, value)

    def _loaded_group(self, saved):
        """The keys of a loaded group, with those that an older checkpoint lacks."""
        group = dict(saved)
        if "rank" in group:
            self._set_defaults(group)
        return group

    def _init_state(self, only=None):
        """Make the missing state of what has a gradient, or of the one parameter `only`."""
        missing = []
        for group in self.param_groups:
            params = [p for p, _ in self.gradients.of(group)] if only is None else [p for p in group["params"] if p is only]
            missing += [(p, group) for p in params if not self.state[p]]
        if missing:
            new_state = self._new_states()
            for param, group in missing:
                self.state[param] = new_state(param, group)

    def _new_states(self):
        """A function of (parameter, its group) that makes a state as it is before the first step."""
        matrices = [p for g in self.param_groups if "rank" in g for p in weights(g)]
        index = {p: i for i, p in enumerate(matrices)}

        def new_state(param, group):
            state, shape = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}, param.shape
            if "rank" in group:
                shape = self.subspace.init(state, param, group, index[param], len(matrices))
                self.residual.init(state, param)
                weight_store(param).init(state, index[param])
            self.inner.init(state, tuple(shape), param, group)
            return state

        return new_state

    def _counter(self, device):
        if device not in self._counters:
            self._counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counters[device]

    def _batches(self, group):
        """Yield (left, params, grads, states) per device, side and store of the group's parameters that have a gradient."""
        batches = {}
        for param, grad in self.gradients.of(group):
            if grad.is_sparse:
                raise ValueError(f"gradients must be dense, got a sparse one for a parameter of shape {tuple(param.shape)}")
            state = self.state[param]
            kind = param.device, state.get("left", False), weight_store(param).group_size
            params, grads, states = batches.setdefault(kind, ([], [], []))
            params.append(param)
            grads.append(grad.contiguous())
            states.append(state)
        for (_, left, _), batch in batches.items():
            yield left, *batch

    def _expect_finite(self, param, grad):
        if not grad.isfinite().all():
            for g, group in enumerate(self.param_groups):
                for i, other in enumerate(group["params"]):
                    if other is param:
                        raise FloatingPointError(f"the gradient of {name_of(group, g, i)} is not finite")

    def _rate(self, group):
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            return lr
        return torch.tensor(1.0 if lr is None else lr, dtype=torch.float32, device="cpu")  # None: a rate relative to the step

    def _step_batches(self, found_inf=None, grad_scale=None):
        """Yield the arguments of `_step_batch` for all that has a gradient. found_inf, grad_scale: a GradScaler's."""
        if grad_scale is not None:
            grad_scale = grad_scale.reciprocal()  # GradScaler's factor divides, the ops' one multiplies
        for group in self.param_groups:
            lr = self._rate(group)
            for left, params, grads, states in self._batches(group):
                yield group, params, grads, states, lr, left, self._guards(params[0].device, grad_scale, found_inf)

    def _step_batch(self, group, params, grads, states, lr, left, guards):
        if "rank" in group:
            self.gradients.low_rank_step(self, group, params, grads, states, lr, left, guards)
        else:
            self.gradients.plain_step(self, group, params, grads, states, lr, guards)

    def _guards(self, device, grad_scale=None, found_inf=None):
        return {"grad_scale": grad_scale, "found_inf": found_inf, "skipped": self._counter(device)}

    def _low_rank_step(self, *arguments):
        """The step of matrices of one batch from their gradients."""
        self._write(partial(self.residual.low_rank_step, self.inner), *arguments)

    def _subspace_step(self, *arguments):
        """The same from R."""
        self._write(self.inner.subspace_step, *arguments)

    def _write(self, step, group, params, *arguments):
        store = weight_store(params[0])
        if not store.int8:
            written = by_rows(params)
            step(group, written, *arguments)
            put_back(params, written)
        elif self.residual.writes_int8(self.inner):
            step(group, params, *arguments)
        else:
            store.in_full(step, group, params, *arguments)

    def _plain_step(self, *arguments):
        self._write(self.inner.plain_step, *arguments)

    def _group_of(self, param):
        return next(group for group in self.param_groups if any(p is param for p in group["params"]))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.gradients.begin(self)
        if self.nonfinite == "raise":
            for group in self.param_groups:
                for param, grad in self.gradients.of(group):
                    self._expect_finite(param, grad)
        self._init_state()
        for batch in self._step_batches(getattr(self, "found_inf", None), getattr(self, "grad_scale", None)):
            self._step_batch(*batch)
        self.gradients.finish(self)
        return loss

    def zero_grad(self, set_to_none=True):
        """Clear the gradients, accumulated low-rank ones included."""
        super().zero_grad(set_to_none)
        self.gradients.zero()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm):
        """Scale all gradients so that the norm of the low-rank and the plain ones is at most `max_norm`; returns it, 0-dim.

        At most the full gradient's norm, for |R| <= |G|. A gradient that is not finite does not count and does not spread.
        With per_layer='accumulate' the same as torch's clip_grad_norm_ over the model's parameters; with dense gradients it
        needs refresh='next' and costs a projection of each.
        """
        return self.gradients.clip(self, max_norm)

    def release(self):
        """Give the weights back: removes what per_layer put on them and into the model. The optimizer is done."""
        self.gradients.release(self)

    def skipped(self):
        """Weight elements left untouched so far because their gradient was not finite. Reads the device."""
        return sum(int(counter) for counter in self._counters.values())

    def refreshes(self):
        """The refresh schedule of every matrix, by name: {"countdown": steps until its next refresh}.

        Where its gap is its own (cos_threshold): also "gap", and "overlaps", those of its last bases with their predecessors,
        oldest first. Reads the device.
        """
        schedule = {}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(weights(group)):
                if "countdown" in self.state.get(param, ()):
                    schedule[name_of(group, g, i)] = self.subspace.describe(self.state[param])
        return schedule

    def state_bytes(self):
        """Bytes of the state as the ledger has them, and of the accumulators of per_layer='accumulate' when they are full."""
        return ledger.state_bytes(self) + sum(self.gradients.memory().values())

    def memory(self):
        """Bytes held now by category (weights, gradients, basis, moments, scales, accumulators, counters, other), and `total`.

        Counts distinct storages, so memory that tensors share counts once. See lowrank_sys.memory.ledger.
        """
        return ledger.memory(self)

    def state_dict(self):
        """As torch's; a checkpoint has no coefficients and no gradients, so it is the same whatever per_layer is."""
        return without_coefficients(self, super().state_dict())

    def load_state_dict(self, state_dict):
        """Load a state, in its own dtypes: torch's casts every tensor but `step` to the parameter's dtype.

        With per_layer='accumulate', gradients accumulated so far are dropped.
        """
        self.gradients.check_loaded(state_dict["param_groups"])
        state_dict = with_coefficients(self, state_dict)
        check_groups(self, state_dict["param_groups"])
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        groups = [group for group in map(self._loaded_group, state_dict["param_groups"]) for _ in group["params"]]
        saved = {param: state_dict["state"].get(i, {}) for i, param in zip(ids, params)}
        for param, state in saved.items():
            if not self.subspace.fits(param, state):
                raise ValueError(
                    f"the state's basis of shape {tuple(state['basis'].shape)} does not fit a parameter of shape "
                    f"{tuple(param.shape)}"
                )
        check_ranks(self, state_dict["param_groups"])
        check_state(self, saved, zip(groups, params), self._new_states())
        super().load_state_dict(state_dict)
        for i, param in zip(ids, params):
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[param][key] = value.to("cpu" if key in self.subspace.on_host else param.device)
        for group in self.param_groups:
            if "rank" in group:
                self._set_defaults(group)  # keys that an older checkpoint lacks
        self.gradients.loaded(self)
