"""per_layer="accumulate": R = project(G) is added to the `.grad` of a coefficient, and G is freed.

Clipping, unscaling and schedulers are the caller's ordinary code on these `.grad`s.
"""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_sys.nn.coefficient import (
    CONTAINER,
    LowRankGradients,
    coefficient_like,
    give_back,
    is_coefficient,
    leave_to_us,
    put_last,
    restore_order,
    zero,
)
from lowrank_sys.nn.projected_linear import ProjectedLinear, Shared, ours_in_ddp
from lowrank_sys.nn.quant_weight import is_quantized, names_of
from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.gradients import Hooked, WeakHook, hooked
from lowrank_sys.optim.ranks import AfterBackward, copy_refreshed, copy_weights, mean_over
from lowrank_sys.optim.sketch_sum import SketchSum
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.rank import of_parameter
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
        process_group: of torch.distributed, of those who train this model together; all by default.

    With several processes DistributedDataParallel averages R of projected layers as any gradient, and leaves the other matrices to
    this part: their R is averaged at the end of a backward in which DistributedDataParallel averages, or else in step(). Sketches
    are averaged in step(), and rank 0's new bases go to all.

    The accumulators cost r*n (left) or m*r elements a matrix, until zero_grad; in a step whose end is due for a refresh, the
    sketch of the matrix is as large again.
    """

    takes_low_rank = True

    def __init__(self, dtype: torch.dtype = torch.float32, model: nn.Module | None = None, process_group=None) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype of the accumulators must be float32 or bfloat16, got {dtype}")
        super().__init__(process_group)
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
        self._averaged = self._sketches_averaged = False  # whether those so far are of all ranks
        self._refreshed = []  # (group, state) of this step
        self._after_backward = None

    def __getstate__(self):
        return {**super().__getstate__(), "_window": {}, "_stepped": {}, "_after_backward": None}

    def know(self, groups):
        if self.model is None and hasattr(groups, "model"):
            self.model = groups.model

    def bind(self, optimizer):
        super().bind(optimizer)
        for weight in self.coefficients:
            self.serve(weight)
        if self._complete:
            self._follow_backward()
            self._unite(optimizer)
            self._announce(optimizer)

    def describe(self):
        return f"accumulate in {self.dtype}, {len(self._layers)} layers projected"

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
        where = {p: name for name, p in self.model.named_parameters()}
        for name, weight in zip(names, group["params"]):
            if weight not in where:
                raise ValueError(f"{name} is not a parameter of the model")
            if weight.dim() != 2:
                raise ValueError(f"per_layer='accumulate' takes matrices, got {name} of shape {tuple(weight.shape)}")
        for i, weight in enumerate(list(group["params"])):
            path, _, name = where[weight].rpartition(".")
            owner = self.model.get_submodule(path)
            if isinstance(owner, ProjectedLinear):
                self._layers[weight], coefficient = owner, owner.coefficient
            else:
                coefficient = self._add_coefficient(optimizer, of_parameter(group, i), weight, owner, where[weight])
            self.coefficients[weight] = coefficient
            group["params"].append(coefficient)
            full_name = ".".join(filter(None, (path, CONTAINER, name)))
            if "param_names" in group:
                group["param_names"].append(full_name)
            self._names[weight] = (where[weight], full_name)
            self.serve(weight)
            leave_to_us(self.model, self._ours_in_ddp(weight))
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

    def _ours_in_ddp(self, weight):
        """Names: DistributedDataParallel would hand a weight without a gradient one of zeros, and cannot broadcast into a
        coefficient or a handle of INT8."""
        name, coefficient = self._names[weight]
        if weight in self._layers:
            return ours_in_ddp(name.rpartition(".")[0], self._layers[weight])
        return [coefficient, *(names_of(name) if is_quantized(weight) else [name])]

    def ready(self, optimizer):
        self._complete = True
        if self.world.size > 1:
            copy_weights(self.world, [w for w in self.coefficients if w not in self._layers or is_quantized(w)])
            optimizer.make_states(self.coefficients)
            groups = (group for group in optimizer.param_groups if "rank" in group)
            pairs = [(group, optimizer.state[w]) for group in groups for w in weights(group)]
            copy_refreshed(self.world, optimizer.pipeline, pairs)
        self._follow_backward()
        self._unite(optimizer)
        self._announce(optimizer)

    def _follow_backward(self):
        """Know when a backward ends, once there are several processes."""
        if self._after_backward is None and self.world.size > 1 and len(self._layers) < len(self.coefficients):
            self._after_backward = AfterBackward(self.model, self, "average_gradients")

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
            on.serve(store, basis, omega, self._sketch_shape(optimizer, weight, omega), WeakHook(self, "take_sketch", weight))

    def _sketch_shape(self, optimizer, weight, omega):
        state = optimizer.state[weight]
        shape = (axis_of(weight.shape, state), omega.shape[1])
        return shape if state["left"] else shape[::-1]

    def _follow(self, optimizer, weight):
        """Put a state that was made before the model was moved where the weight is now."""
        state = optimizer.state[weight]
        if state["step"].device != weight.device:
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = optimizer.pipeline.subspace.placed(key, value, weight.device)

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
        ours = self._ours_in_ddp(weight)
        coefficient, _ = self.coefficients.pop(weight), self._names.pop(weight)
        coefficient.grad = None
        layer = self._layers.pop(weight, None)
        if layer is not None:
            layer.projection.clear()
            return
        give_back(self.model, ours)
        for owner in list(self.model.modules()):
            held = owner._modules.get(CONTAINER)
            if held is not None:
                held.remove(coefficient)
                if not held._parameters:
                    delattr(owner, CONTAINER)
        restore_order(self.model)

    def release(self, optimizer):
        super().release(optimizer)
        if self._after_backward is not None:
            self._after_backward.handle.remove()
            self._after_backward = None
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
        if self._after_backward is not None:
            self._after_backward.begun()

    # What ranks do together: in the same order on all of them, whatever each has.

    def average_gradients(self):
        """Put the mean over all ranks in place of R of the matrices that DistributedDataParallel leaves alone."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            ours = {w: c for w, c in self.coefficients.items() if w not in self._layers and w.requires_grad}
            makes = [lambda c=c: torch.zeros(c.shape, dtype=self.dtype, device=c.device) for c in ours.values()]
            for (weight, c), mean in zip(ours.items(), mean_over(self.world, [c.grad for c in ours.values()], makes)):
                c.grad = mean
                if mean is not None:
                    self.remember(weight, c)
            self._averaged = True

    def _average_sketches(self, optimizer):
        """The same of the sketches that are due, and let a matrix count as one with a gradient where it is on any rank."""
        due = {}
        for weight, c in self.coefficients.items():
            trains = c.requires_grad if weight in self._layers else weight.requires_grad
            if trains and weight not in self._window:
                sketch = self._new_sketch(optimizer, weight)
                if sketch is not None:
                    due[weight] = sketch
                elif c.grad is not None:
                    self._window[weight] = None
            elif trains and self._window[weight] is not None:
                due[weight] = self._window[weight]
        makes = [lambda w=w, on=on: on.omega.new_zeros(self._sketch_shape(optimizer, w, on.omega)).float() for w, on in due.items()]
        for (weight, sketch), mean in zip(due.items(), mean_over(self.world, [on.total for on in due.values()], makes)):
            if mean is not None:
                sketch.total, self._window[weight] = mean, sketch
        self._sketches_averaged = True

    def _share_bases(self, optimizer):
        if self.world.size > 1:
            copy_refreshed(self.world, optimizer.pipeline, self._refreshed)
        self._refreshed = []

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
        self._averaged = self._sketches_averaged = False
        if weight not in self._window:
            self._expect_new(weight, self.coefficients[weight])
            self._window[weight] = self._new_sketch(self.optimizer, weight)
        return self._window[weight]

    def _new_sketch(self, optimizer, weight):
        """Of a matrix whose basis is due, else None."""
        if weight in self._layers:
            omega = self._layers[weight].projection.omega
        else:
            state = optimizer.state_of(weight)
            self._fit(optimizer, weight, self.coefficients[weight], state)
            omega = optimizer.pipeline.directions(optimizer.group_of(weight), weight, state)
        return None if omega is None else SketchSum(omega)

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
            elif weight not in self._window and (self.world.size == 1 or not self._window):  # R may be that of other ranks
                self._expect_new(weight, coefficient)
        if self.world.size > 1:
            if not self._averaged:
                self.average_gradients()
            if not self._sketches_averaged:
                self._average_sketches(optimizer)
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
        self._refreshed += [(batch.group, s) for s, sketch in zip(batch.states, batch.sketches) if sketch is not None]

    def clip(self, optimizer, max_norm):
        self.begin(optimizer)
        grads = [grad for group in optimizer.param_groups for _, grad in self.of(group)]
        return (
            scale_to_norm_(grads, gradient_norms(grads), max_norm) if grads else torch.zeros((), dtype=torch.float32, device="cpu")
        )

    def finish(self, optimizer):
        self._share_bases(optimizer)
        self._follow_backward()
        self._window.clear()
        self._averaged = self._sketches_averaged = False
        self._stepped = {w: _identity(c.grad) for w, c in self.coefficients.items() if c.grad is not None}
        self._announce(optimizer)

    def zero(self):
        self._window.clear()
        self._averaged = self._sketches_averaged = False

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


def _identity(grad):
    return StorageWeakRef(grad.untyped_storage()), grad._version
