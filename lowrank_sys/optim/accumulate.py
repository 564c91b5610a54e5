"""per_layer="accumulate": R = project(G) is added to the `.grad` of a coefficient, and G is freed.

Clipping, unscaling and schedulers are the caller's ordinary code on these `.grad`s.
"""

import torch
from torch import nn

from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.optim.coefficient import (
    CONTAINER,
    LowRankGradients,
    coefficient_like,
    is_coefficient,
    put_last,
    restore_order,
    weights,
    zero,
)
from lowrank_sys.optim.gradients import Hooked, expect_one_process

# The category of R's accumulators in an account of memory.
ACCUMULATORS = "accumulators"


class Accumulate(Hooked):
    """per_layer="accumulate": gradients are projected as soon as they exist, and R accumulates.

    `coefficient.grad += project(W.grad); W.grad = None`, once a backward. All micro-batches between two steps share one basis;
    a basis that is due comes from their accumulated sketch and serves from the next step on (refresh='next', which see).

    Args:
        dtype: of the accumulators, torch.float32 or torch.bfloat16 (rounded once a micro-batch).
        model: that holds the coefficients; that of param_groups(model) if its groups are given as they are.

    The accumulators cost r*n (left) or m*r elements a matrix, until zero_grad; in a step whose end is due for a refresh, the
    sketch of the matrix is as large again.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype of the accumulators must be float32 or bfloat16, got {dtype}")
        super().__init__()
        self.defaults = {"refresh": "next"}
        self.dtype = dtype
        self.model = model
        self.coefficients = {}
        self._names = {}  # weight -> its name in the model, and its coefficient's
        self._window = {}  # weight -> its sketch, or None: what has had a gradient since the last step
        self._stepped = {}  # weight -> which gradient the last step used

    def __getstate__(self):
        return {**super().__getstate__(), "_window": {}, "_stepped": {}}

    def know(self, groups):
        if self.model is None and hasattr(groups, "model"):
            self.model = groups.model

    def bind(self, optimizer):
        super().bind(optimizer)
        for weight in self.coefficients:
            self.serve(weight)

    def check(self, optimizer):
        if not optimizer.pipeline.from_low_rank:
            raise ValueError(f"per_layer='accumulate' needs a rule that can start from R, got {type(optimizer).__name__}")

    def attach(self, optimizer, group, names):
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        if self.model is None:
            raise ValueError(
                "per_layer='accumulate' needs the model: give the groups of param_groups(model) as they are, or "
                "per_layer=Accumulate(model=model)"
            )
        if group["refresh"] != "next":
            raise ValueError(f"refresh must be 'next' with per_layer='accumulate', got {group['refresh']!r}")
        expect_one_process()
        where = {p: name for name, p in self.model.named_parameters()}
        for name, weight in zip(names, group["params"]):
            if weight not in where:
                raise ValueError(f"{name} is not a parameter of the model")
            if weight.dim() != 2:
                raise ValueError(f"per_layer='accumulate' takes matrices, got {name} of shape {tuple(weight.shape)}")
        for weight in list(group["params"]):
            _, shape = optimizer.pipeline.subspace.low_rank_shape(group, weight)
            coefficient = self.coefficients[weight] = coefficient_like(shape, self.dtype, weight.device)
            path, _, name = where[weight].rpartition(".")
            owner = self.model.get_submodule(path)
            if not hasattr(owner, CONTAINER):
                owner.add_module(CONTAINER, LowRankGradients())
            getattr(owner, CONTAINER).add(name, coefficient)
            put_last(self.model, path)
            full_name = ".".join(filter(None, (path, CONTAINER, name)))
            group["params"].append(coefficient)
            if "param_names" in group:
                group["param_names"].append(full_name)
            self._names[weight] = (where[weight], full_name)
            self.serve(weight)
            # DDP would hand the weights a zero gradient of their size, and cannot broadcast into an expanded tensor.
            self.model._ddp_params_and_buffers_to_ignore = [*self._ddp_ignores(), *self._names[weight]]

    def _ddp_ignores(self):
        return getattr(self.model, "_ddp_params_and_buffers_to_ignore", [])

    def drop(self, weight):
        super().drop(weight)
        coefficient, names = self.coefficients.pop(weight), self._names.pop(weight)
        coefficient.grad = None
        self.model._ddp_params_and_buffers_to_ignore = [name for name in self._ddp_ignores() if name not in names]
        for owner in list(self.model.modules()):
            held = owner._modules.get(CONTAINER)
            if held is not None:
                held.remove(coefficient)
                if not held._parameters:
                    delattr(owner, CONTAINER)
        restore_order(self.model)

    def release(self, optimizer):
        super().release(optimizer)
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if not is_coefficient(p)]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in kept]

    def use(self, optimizer, weight, grad):
        state, coefficient, subspace = optimizer.state_of(weight), self.coefficients[weight], optimizer.pipeline.subspace
        group = optimizer.group_of(weight)
        if weight not in self._window:
            self._open(optimizer, group, weight, coefficient, state)
        sketch = self._window[weight]
        low_rank = subspace.project(group, grad, state)
        if sketch is not None:
            sketch.add(subspace.sketch(grad, sketch.omega, state["left"]), coefficient.grad)
        if coefficient.grad is None:
            coefficient.grad = low_rank.to(self.dtype)
        else:
            coefficient.grad.add_(low_rank)
        if sketch is not None:
            sketch.version = coefficient.grad._version

    def _open(self, optimizer, group, weight, coefficient, state):
        """The first gradient of this weight since the last step."""
        expect_one_process()
        self._expect_new(weight, coefficient)
        self._fit(optimizer, weight, coefficient, state)
        omega = optimizer.pipeline.directions(group, weight, state)
        self._window[weight] = None if omega is None else _Sketch(omega)

    def _expect_new(self, weight, coefficient):
        if coefficient.grad is not None and self._stepped.get(weight) == _identity(coefficient.grad):
            raise RuntimeError(
                "the last step's low-rank gradients are still there, and their basis may have changed since: "
                "call zero_grad() after step()"
            )

    def _fit(self, optimizer, weight, coefficient, state):
        """A model that was moved, cast or copied carries its coefficients along as full tensors; a loaded state may have
        another rank."""
        shape = optimizer.pipeline.subspace.shape_of(weight, state)
        if (coefficient.shape, coefficient.dtype, coefficient.device) != (shape, self.dtype, weight.device) or (
            coefficient.untyped_storage().nbytes() > coefficient.element_size()
        ):
            coefficient.grad = None
            coefficient.data = zero(shape, self.dtype, weight.device)

    def of(self, group):
        if "rank" not in group:
            return super().of(group)
        pairs = ((w, self.coefficients[w].grad) for w in weights(group))
        return [(w, grad) for w, grad in pairs if grad is not None]

    @torch.no_grad()
    def begin(self, optimizer):
        super().begin(optimizer)
        for weight, coefficient in self.coefficients.items():
            if weight.grad is not None:  # put there by hand
                self.take(weight)
            elif weight not in self._window:
                self._expect_new(weight, coefficient)

    projected = True

    def step(self, optimizer, batch, lr):
        if not batch.projected:
            return super().step(optimizer, batch, lr)
        if self.dtype == torch.float32:
            optimizer.pipeline.update(batch, lr)
        else:
            for one in batch.one_by_one(lambda low_rank: low_rank.float()):  # one fp32 copy at a time
                optimizer.pipeline.update(one, lr)
        windows = [self._window.get(param) for param in batch.params]
        batch.sketches = [None if window is None else window.total for window in windows]
        optimizer.pipeline.renew(batch, lr)

    def clip(self, optimizer, max_norm):
        self.begin(optimizer)
        grads = [grad for group in optimizer.param_groups for _, grad in self.of(group)]
        return (
            scale_to_norm_(grads, gradient_norms(grads), max_norm) if grads else torch.zeros((), dtype=torch.float32, device="cpu")
        )

    def finish(self, optimizer):
        self._window.clear()
        self._stepped = {w: _identity(c.grad) for w, c in self.coefficients.items() if c.grad is not None}

    def zero(self):
        self._window.clear()

    def check_loaded(self, groups):
        for group in groups:
            if "rank" in group and group.get("subspace") == "svd":
                raise ValueError(
                    "a state with subspace='svd' cannot go on with per_layer='accumulate': exact bases need whole gradients"
                )

    def loaded(self, optimizer):
        """Gradients that were projected on another basis are dropped."""
        self._window.clear()
        self._stepped.clear()
        for coefficient in self.coefficients.values():
            coefficient.grad = None
        for group in optimizer.param_groups:
            if "rank" in group:
                group["refresh"] = "next"

    def held(self, optimizer):
        """For the ledger: the coefficients, the low-rank gradients and the sketches that are alive."""
        sketches = [t for sketch in self._window.values() if sketch is not None for t in (sketch.omega, sketch.total)]
        grads = [coefficient.grad for coefficient in self.coefficients.values()]
        for tensor in (*self.coefficients.values(), *grads, *sketches):
            if tensor is not None:
                yield ACCUMULATORS, tensor

    def memory(self):
        sketches = [t for sketch in self._window.values() if sketch is not None for t in (sketch.omega, sketch.total)]
        held = sum(c.numel() * c.element_size() for c in self.coefficients.values())
        return {ACCUMULATORS: held + sum(t.numel() * t.element_size() for t in sketches if t is not None)}


class _Sketch:
    """Y = G Omega, summed over a window beside R."""

    def __init__(self, omega):
        self.omega = omega
        self.total = None
        self.version = None  # of the accumulated R after the last sum

    def add(self, product, low_rank_grad):
        """Add a micro-batch. low_rank_grad: R so far; if zero_grad was called since, so is the sketch."""
        if self.total is None or low_rank_grad is None:
            self.total = product
            return
        if low_rank_grad._version != self.version:
            self.total.masked_fill_(~low_rank_grad.any(), 0)
        self.total.add_(product)


def _identity(grad):
    return grad.untyped_storage()._cdata, grad._version
