"""per_layer="accumulate": R = project(G) is added to the `.grad` of a coefficient, and G is freed.

Clipping, unscaling and schedulers are the caller's ordinary code on these `.grad`s.
"""

import torch
from torch import nn

from lowrank_sys.nn.coefficient import is_coefficient
from lowrank_sys.nn.quant_weight import is_quantized
from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.gradients import Hooked, WeakHook, hooked
from lowrank_sys.optim.model_coefficients import ModelCoefficients
from lowrank_sys.optim.projected_layers import announce, follow, pool, sketch_shape, unite
from lowrank_sys.optim.ranks import AfterBackward, copy_refreshed, copy_weights, mean_over
from lowrank_sys.optim.sketch_sum import SketchSum
from lowrank_sys.optim.window import Window
from lowrank_sys.subspace.rank import of_parameter

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
        self.in_model = ModelCoefficients(model, dtype)
        self.window = Window()
        self._families = []  # lists of weights that share one basis
        self._complete = False  # whether the optimizer has its first groups
        self._refreshed = []  # (group, state) of this step
        self._after_backward = None

    def __getstate__(self):
        return {**super().__getstate__(), "window": Window(), "_after_backward": None}

    @property
    def model(self):
        return self.in_model.model

    @property
    def coefficients(self):
        """{weight: its coefficient}."""
        return self.in_model.of

    @property
    def layers(self):
        """{weight: its ProjectedLinear} of those in one."""
        return self.in_model.layers

    def know(self, groups):
        if self.model is None and hasattr(groups, "model"):
            self.in_model.model = groups.model

    def bind(self, optimizer):
        super().bind(optimizer)
        for weight in self.coefficients:
            self.serve(weight)
        if self._complete:
            self._follow_backward()
            self._unite(optimizer)
            self._announce(optimizer)

    def describe(self):
        return f"accumulate in {self.dtype}, {len(self.layers)} layers projected"

    def check(self, optimizer):
        if not optimizer.pipeline.from_low_rank:
            raise ValueError(f"per_layer='accumulate' needs a rule that can start from R, got {type(optimizer).__name__}")

    def attach(self, optimizer, group, names):
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        where = self.in_model.places(group, names)
        if group["refresh"] != "next":
            raise ValueError(f"refresh must be 'next' with per_layer='accumulate', got {group['refresh']!r}")
        for i, weight in enumerate(list(group["params"])):
            _, shape = optimizer.pipeline.subspace.low_rank_shape(of_parameter(group, i), weight)
            coefficient, name = self.in_model.add(weight, where[weight], shape)
            group["params"].append(coefficient)
            if "param_names" in group:
                group["param_names"].append(name)
            self.serve(weight)
            self.in_model.leave_to_us(weight)
        if self._complete:
            self.ready(optimizer)

    def ready(self, optimizer):
        self._complete = True
        if self.world.size > 1:
            copy_weights(self.world, [w for w in self.coefficients if w not in self.layers or is_quantized(w)])
            optimizer.make_states(self.coefficients)
            groups = (group for group in optimizer.param_groups if "rank" in group)
            pairs = [(group, optimizer.state[w]) for group in groups for w in weights(group)]
            copy_refreshed(self.world, optimizer.pipeline, pairs)
        self._follow_backward()
        self._unite(optimizer)
        self._announce(optimizer)

    @torch.no_grad()
    def _unite(self, optimizer):
        self._families = unite(optimizer, self.layers)

    @torch.no_grad()
    def _announce(self, optimizer):
        """Tell the projected layers the basis of the next window, and what to sketch for the one after it."""
        if not self.layers:
            return
        optimizer.make_states(self.layers)
        for group in optimizer.param_groups:
            for weight in weights(group):
                if weight in self.layers:
                    self._fit(optimizer, weight, optimizer.state[weight])
                    announce(optimizer, group, weight, self.layers[weight], WeakHook(self, "take_sketch", weight))

    def announced(self):
        """Names of the weights of projected layers whose next backward also sketches, for a basis that is due."""
        return [self.in_model.name_of(weight) for weight, layer in self.layers.items() if layer.projection.omega is not None]

    def _fit(self, optimizer, weight, state):
        self.in_model.fit(weight, optimizer.pipeline.subspace.shape_of(weight, state))

    # Hooks, and what autograd does with the coefficient of a projected layer.

    def hooks(self, weight):
        if weight not in self.layers:
            return super().hooks(weight)
        leaf = self.coefficients[weight]
        return [
            hooked(leaf, leaf.register_hook, WeakHook(self, "expect_more", weight)),
            hooked(leaf, leaf.register_post_accumulate_grad_hook, WeakHook(self, "remember", weight)),
        ]

    def drop(self, weight):
        super().drop(weight)
        self.in_model.drop(weight)

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
        self.window.remember(weight, coefficient)
        if self._after_backward is not None:
            self._after_backward.begun()

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
        self.window.remember(weight, coefficient)

    def _opened(self, weight):
        """The sketch of this weight since the last step, None if its basis is not due."""
        return self.window.open(weight, self.coefficients[weight], lambda: self._new_sketch(self.optimizer, weight))

    def _new_sketch(self, optimizer, weight):
        """Of a matrix whose basis is due, else None."""
        if weight in self.layers:
            omega = self.layers[weight].projection.omega
        else:
            state = optimizer.state_of(weight)
            self._fit(optimizer, weight, state)
            omega = optimizer.pipeline.directions(optimizer.group_of(weight), weight, state)
        return None if omega is None else SketchSum(omega)

    # What ranks do together: in the same order on all of them, whatever each has.

    def _follow_backward(self):
        """Know when a backward ends, once there are several processes."""
        if self._after_backward is None and self.world.size > 1 and len(self.layers) < len(self.coefficients):
            self._after_backward = AfterBackward(self.model, self, "average_gradients")

    def average_gradients(self):
        """Put the mean over all ranks in place of R of the matrices that DistributedDataParallel leaves alone."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            ours = {w: c for w, c in self.coefficients.items() if w not in self.layers and w.requires_grad}
            makes = [lambda c=c: torch.zeros(c.shape, dtype=self.dtype, device=c.device) for c in ours.values()]
            for (weight, c), mean in zip(ours.items(), mean_over(self.world, [c.grad for c in ours.values()], makes)):
                c.grad = mean
                if mean is not None:
                    self.window.remember(weight, c)
            self.window.averaged = True

    def _average_sketches(self, optimizer):
        """The same of the sketches that are due, and let a matrix count as one with a gradient where it is on any rank."""
        due, sketches = {}, self.window.sketches
        for weight, c in self.coefficients.items():
            trains = c.requires_grad if weight in self.layers else weight.requires_grad
            if trains and weight not in sketches:
                sketch = self._new_sketch(optimizer, weight)
                if sketch is not None:
                    due[weight] = sketch
                elif c.grad is not None:
                    sketches[weight] = None
            elif trains and sketches[weight] is not None:
                due[weight] = sketches[weight]
        shapes = [sketch_shape(weight, optimizer.state[weight], on.omega) for weight, on in due.items()]
        makes = [lambda on=on, s=shape: on.omega.new_zeros(s).float() for on, shape in zip(due.values(), shapes)]
        for (weight, sketch), mean in zip(due.items(), mean_over(self.world, [on.total for on in due.values()], makes)):
            if mean is not None:
                sketch.total, sketches[weight] = mean, sketch
        self.window.sketches_averaged = True

    def _share_bases(self, optimizer):
        if self.world.size > 1:
            copy_refreshed(self.world, optimizer.pipeline, self._refreshed)
        self._refreshed = []

    # The step.

    def of(self, group):
        if "rank" not in group:
            return super().of(group)
        pairs = ((w, self.coefficients[w].grad) for w in weights(group))
        return [(w, grad) for w, grad in pairs if grad is not None]

    @torch.no_grad()
    def begin(self, optimizer):
        super().begin(optimizer)
        window = self.window
        for weight in self.layers:
            follow(optimizer, weight)
        for weight, coefficient in self.coefficients.items():
            if weight.grad is not None:  # put there by hand
                self.take(weight)
            elif weight not in window.sketches and (self.world.size == 1 or not window.sketches):  # R may be that of other ranks
                window.expect_new(weight, coefficient)
        if self.world.size > 1:
            if not window.averaged:
                self.average_gradients()
            if not window.sketches_averaged:
                self._average_sketches(optimizer)
        pool(self._families, self.layers, window)

    projected = True

    def step(self, optimizer, batch, lr):
        if not batch.projected:
            return super().step(optimizer, batch, lr)
        if self.dtype == torch.float32:
            optimizer.pipeline.update(batch, lr)
        else:
            for one in batch.one_by_one(lambda low_rank: low_rank.float()):  # one fp32 copy at a time
                optimizer.pipeline.update(one, lr)
        sketches = [self.window.sketches.get(param) for param in batch.params]
        batch.sketches = [None if sketch is None else sketch.total for sketch in sketches]
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
        self.window.close(self.coefficients)
        self._announce(optimizer)

    def zero(self):
        self.window.clear()

    def check_loaded(self, groups):
        for group in groups:
            if "rank" in group and group.get("subspace") == "svd":
                raise ValueError(
                    "a state with subspace='svd' cannot go on with per_layer='accumulate': exact bases need whole gradients"
                )

    def loaded(self, optimizer):
        """Gradients that were projected on another basis are dropped."""
        self.window.forget()
        for coefficient in self.coefficients.values():
            coefficient.grad = None
        for group in optimizer.param_groups:
            if "rank" in group:
                group["refresh"] = "next"
        self._unite(optimizer)
        self._announce(optimizer)

    # What it holds.

    def held(self, optimizer):
        """For the ledger: the coefficients, the low-rank gradients and the sketches that are alive."""
        grads = [coefficient.grad for coefficient in self.coefficients.values()]
        for tensor in (*self.coefficients.values(), *grads, *self._sketches()):
            if tensor is not None:
                yield ACCUMULATORS, tensor

    def _sketches(self):
        """Omegas and sums of what is due."""
        yield from (layer.projection.omega for layer in self.layers.values())
        for weight, sketch in self.window.sketches.items():
            if sketch is not None:
                yield sketch.total
                if weight not in self.layers:
                    yield sketch.omega

    def memory(self):
        held = sum(c.numel() * c.element_size() for c in self.coefficients.values())
        return {ACCUMULATORS: held + sum(t.numel() * t.element_size() for t in self._sketches() if t is not None)}
