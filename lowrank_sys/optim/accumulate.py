"""per_layer="accumulate": R = project(G) is added to the `.grad` of a coefficient, and G is freed.

Clipping, unscaling and schedulers are the caller's ordinary code on these `.grad`s.
"""

import torch
from torch import nn

from lowrank_sys.nn.coefficient import CONTAINER, LowRankGradients, coefficient_like, is_coefficient, put_last, restore_order, zero
from lowrank_sys.nn.projected_linear import ProjectedLinear, Shared
from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.gradients import Hooked, WeakHook, expect_one_process, hooked
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.refresh import COLD

# The category of R's accumulators in an account of memory.
ACCUMULATORS = "accumulators"


class Accumulate(Hooked):
    """per_layer="accumulate": gradients are projected as soon as they exist, and R accumulates.

    `coefficient.grad += project(W.grad); W.grad = None`, once a backward; the backward of a ProjectedLinear does without W.grad.
    All micro-batches between two steps share one basis; a basis that is due comes from their accumulated sketch and serves from the
    next step on (refresh='next', which see).

    Args:
        dtype: of the accumulators, torch.float32 or torch.bfloat16 (rounded once a micro-batch).
        model: that holds the coefficients; that of param_groups(model) if its groups are given as they are.

    The accumulators cost r*n (left) or m*r elements a matrix, until zero_grad; in a step whose end is due for a refresh, the
    sketch of the matrix is as large again.
    """

    takes_low_rank = True

    def __init__(self, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype of the accumulators must be float32 or bfloat16, got {dtype}")
        super().__init__()
        self.defaults = {"refresh": "next"}
        self.dtype = dtype
        self.model = model
        self.coefficients = {}
        self._layers = {}  # weight -> its ProjectedLinear, if it is in one
        self._families = []  # lists of weights that share one basis
        self._complete = False  # whether the optimizer has its first groups
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
        if self._complete:
            self._unite(optimizer)
            self._announce(optimizer)

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
            path, _, name = where[weight].rpartition(".")
            owner = self.model.get_submodule(path)
            if isinstance(owner, ProjectedLinear):
                self._layers[weight], coefficient = owner, owner.coefficient
            else:
                coefficient = self._add_coefficient(optimizer, group, weight, owner, where[weight])
            self.coefficients[weight] = coefficient
            group["params"].append(coefficient)
            full_name = ".".join(filter(None, (path, CONTAINER, name)))
            if "param_names" in group:
                group["param_names"].append(full_name)
            self._names[weight] = (where[weight], full_name)
            self.serve(weight)
            if weight not in self._layers:
                # DDP would hand the weights a zero gradient of their size, and cannot broadcast into an expanded tensor.
                self.model._ddp_params_and_buffers_to_ignore = [*self._ddp_ignores(), *self._names[weight]]
        if self._complete:
            self.ready(optimizer)

    def _add_coefficient(self, optimizer, group, weight, owner, full_name):
        path, _, name = full_name.rpartition(".")
        _, shape = optimizer.pipeline.subspace.low_rank_shape(group, weight)
        coefficient = coefficient_like(shape, self.dtype, weight.device)
        if not hasattr(owner, CONTAINER):
            owner.add_module(CONTAINER, LowRankGradients())
        getattr(owner, CONTAINER).add(name, coefficient)
        put_last(self.model, path)
        return coefficient

    def ready(self, optimizer):
        self._complete = True
        self._unite(optimizer)
        self._announce(optimizer)

    @torch.no_grad()
    def _unite(self, optimizer):
        """Give the members of a family one basis and one schedule, as long as none of them has been chosen, and one X B if they
        have one basis."""
        families = {}
        for weight, layer in self._layers.items():
            if layer.projection.family is not None:
                families.setdefault((layer.projection.family, layer.rank, weight.dtype), []).append(weight)
        optimizer.make_states(self._layers)
        drawn = {weight for weight in self._layers if "row_scale" in optimizer.state[weight]}  # for each matrix by itself
        self._families = [weights for weights in families.values() if len(weights) > 1 and drawn.isdisjoint(weights)]
        for members in self._families:
            states, shared = [optimizer.state[weight] for weight in members], Shared(len(members))
            keys = store_of(states[0]).present(states[0])
            if all(state["countdown"] <= COLD for state in states):
                for state in states[1:]:
                    state.update({key: states[0][key] for key in ("seed", "first_gap")})
                    for key in ("countdown", *keys):
                        state[key].copy_(states[0][key])
            shared.together = all(
                torch.equal(state[key], states[0][key]) for state in states for key in ("countdown", *keys)
            )  # where they were trained apart, each keeps its own
            for weight in members:
                self._layers[weight].projection.shared = shared

    def _pool(self):
        """Let the members of a family choose their next basis from all their sketches."""
        for members in self._families:
            on = self._layers[members[0]].projection
            present = [weight for weight in members if weight in self._window]
            sketches = [self._window[weight] for weight in present]
            sketches = [sketch for sketch in sketches if sketch is not None and sketch.total is not None]
            for one in (present, sketches):  # a schedule stands still without gradients: from then on they are apart
                on.shared.together &= len(one) in (0, len(members))
            if on.shared.together and sketches:
                total = torch.cat([sketch.total for sketch in sketches], dim=1 if on.left else 0)
                for sketch in sketches:
                    sketch.total = total

    @torch.no_grad()
    def _announce(self, optimizer):
        """Tell the projected layers the basis of the next window, and what to sketch for the one after it."""
        if not self._layers:
            return
        optimizer.make_states(self._layers)
        for group in optimizer.param_groups:
            for weight in weights(group):
                if weight in self._layers:
                    self._serve_layer(optimizer, group, weight)

    def announced(self):
        """Names of the weights of projected layers whose next backward also sketches, for a basis that is due."""
        return [self._names[weight][0] for weight, layer in self._layers.items() if layer.projection.omega is not None]

    def _serve_layer(self, optimizer, group, weight):
        state, on = optimizer.state[weight], self._layers[weight].projection
        self._fit(optimizer, weight, self.coefficients[weight], state)
        store = store_of(state)
        on.left, on.rank = state["left"], store.rank(state)
        basis, omega = [state[key] for key in store.present(state)], optimizer.pipeline.directions(group, weight, state)
        if omega is None:
            on.serve(store, basis)
        else:
            d, columns = axis_of(weight.shape, state), omega.shape[1]
            shape = (d, columns) if on.left else (columns, d)
            on.serve(store, basis, omega, shape, WeakHook(self, "take_sketch", weight))

    def _follow(self, optimizer, weight):
        """Put a state that was made before the model was moved where the weight is now."""
        state = optimizer.state[weight]
        if state["step"].device != weight.device:
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = optimizer.pipeline.subspace.placed(key, value, weight.device)

    def _ddp_ignores(self):
        return getattr(self.model, "_ddp_params_and_buffers_to_ignore", [])

    def hooks(self, weight):
        if weight not in self._layers:
            return super().hooks(weight)
        leaf = self.coefficients[weight]
        return [
            hooked(leaf, leaf.register_hook, WeakHook(self, "expect_more", weight)),
            hooked(leaf, leaf.register_post_accumulate_grad_hook, WeakHook(self, "remember", weight)),
        ]

    def drop(self, weight):
        super().drop(weight)
        coefficient, names = self.coefficients.pop(weight), self._names.pop(weight)
        coefficient.grad = None
        layer = self._layers.pop(weight, None)
        if layer is not None:
            layer.projection.clear()
            return
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
        coefficient, subspace = self.coefficients[weight], optimizer.pipeline.subspace
        sketch, group, state = self._opened(weight), optimizer.group_of(weight), optimizer.state_of(weight)
        low_rank = subspace.project(group, grad, state)
        if sketch is not None:
            sketch.expect(coefficient.grad)
            sketch.add(subspace.sketch(grad, sketch.omega, state["left"]))
        if coefficient.grad is None:
            coefficient.grad = low_rank.to(self.dtype)
        else:
            coefficient.grad.add_(low_rank)
        self.remember(weight, coefficient)

    # What autograd does with the coefficient of a projected layer.

    def expect_more(self, weight, grad):
        """R is about to be added to."""
        sketch = self._opened(weight)
        if sketch is not None:
            sketch.expect(self.coefficients[weight].grad)

    def take_sketch(self, weight, leaf):
        """The sketch of a backward is there, before its R or after."""
        product, leaf.grad = leaf.grad, None
        sketch = self._opened(weight)
        if sketch is not None:
            sketch.add(product)

    def remember(self, weight, coefficient):
        """R was added to."""
        sketch = self._window.get(weight)
        if sketch is not None:
            sketch.version = coefficient.grad._version

    def _opened(self, weight):
        """The sketch of this weight since the last step, None if its basis is not due."""
        if weight not in self._window:
            optimizer, coefficient = self.optimizer, self.coefficients[weight]
            expect_one_process()
            self._expect_new(weight, coefficient)
            if weight in self._layers:
                omega = self._layers[weight].projection.omega
            else:
                state = optimizer.state_of(weight)
                self._fit(optimizer, weight, coefficient, state)
                omega = optimizer.pipeline.directions(optimizer.group_of(weight), weight, state)
            self._window[weight] = None if omega is None else _Sketch(omega)
        return self._window[weight]

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
        for weight in self._layers:
            self._follow(optimizer, weight)
        for weight, coefficient in self.coefficients.items():
            if weight.grad is not None:  # put there by hand
                self.take(weight)
            elif weight not in self._window:
                self._expect_new(weight, coefficient)
        self._pool()

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
        self._announce(optimizer)

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
        self._unite(optimizer)
        self._announce(optimizer)

    def held(self, optimizer):
        """For the ledger: the coefficients, the low-rank gradients and the sketches that are alive."""
        grads = [coefficient.grad for coefficient in self.coefficients.values()]
        for tensor in (*self.coefficients.values(), *grads, *self._sketches()):
            if tensor is not None:
                yield ACCUMULATORS, tensor

    def _sketches(self):
        """Omegas and sums of what is due."""
        yield from (layer.projection.omega for layer in self._layers.values())
        for weight, sketch in self._window.items():
            if sketch is not None:
                yield sketch.total
                if weight not in self._layers:
                    yield sketch.omega

    def memory(self):
        held = sum(c.numel() * c.element_size() for c in self.coefficients.values())
        return {ACCUMULATORS: held + sum(t.numel() * t.element_size() for t in self._sketches() if t is not None)}


class _Sketch:
    """Y = G Omega, summed over a window beside R. Of each gradient `expect` and `add` are called once, in any order."""

    def __init__(self, omega):
        self.omega = omega
        self.total = None
        self.version = None  # of the accumulated R after the last sum
        self._expected, self._waiting = False, None

    def expect(self, low_rank_grad):
        """R so far, before a gradient is added; if zero_grad was called since the last one, the sum is zeroed too."""
        if low_rank_grad is None:
            self.total = None
        elif self.total is not None and low_rank_grad._version != self.version:
            self.total.masked_fill_(~low_rank_grad.any(), 0)
        waiting, self._waiting, self._expected = self._waiting, None, True
        if waiting is not None:
            self.add(waiting)

    def add(self, product):
        """The sketch of that gradient, which is taken."""
        if not self._expected:
            self._waiting = product
        elif self.total is None:
            self.total, self._expected = product, False
        else:
            self.total.add_(product)
            self._expected = False


def _identity(grad):
    return grad.untyped_storage()._cdata, grad._version
