"""When the gradient of a matrix is projected: at the step, as soon as it exists, or with its whole step inside backward.

`per_layer="accumulate"`: R = project(G) is added to the `.grad` of a coefficient, a zero parameter of R's shape in the model and
in the optimizer's groups, and G is freed. Clipping, unscaling and schedulers are the caller's ordinary code on these `.grad`s.
`per_layer="in_backward"`: the matrix takes its step at once, and nothing is kept.
"""

import weakref

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_sys._ops.rules import low_rank_shape
from lowrank_sys.optim.clip import clip_factor, gradient_norms, scale_to_norm_

# Name of the child module that holds the coefficients of a module's weights.
CONTAINER = "low_rank_gradients"
# The category of R's accumulators in an account of memory.
ACCUMULATORS = "accumulators"

# weight -> weak reference to the part whose hook takes its gradients: the newest optimizer of a weight serves it.
_SERVED = WeakTensorKeyDictionary()


class Coefficient(nn.Parameter):
    """The zero parameter whose `.grad` is the low-rank gradient R of a matrix.

    A single zero, expanded: it takes no memory, and needs no gradient of autograd's.
    """

    def __new__(cls, data=None, requires_grad=False):
        return super().__new__(cls, data, requires_grad)

    def __reduce_ex__(self, protocol):
        return _coefficient, (tuple(self.shape), self.dtype, self.device)


def _zero(shape, dtype, device):
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _coefficient(shape, dtype, device):
    return Coefficient(_zero(shape, dtype, device))


class LowRankGradients(nn.Module):
    """The coefficients of a module's weights: parameters() yields them, state_dict() and save_pretrained() leave them out.

    A child of the module that owns the weight (a linear layer calls no children), so that clipping a part of the model
    finds them too.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def extra_repr(self):
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self._parameters.items())


def weights(group):
    """The parameters of a group without their coefficients."""
    return [p for p in group["params"] if not isinstance(p, Coefficient)]


class AtStep:
    """Gradients stay whole until the step, as in any optimizer."""

    served_by_hooks = False
    defaults = {}  # group keys that differ from the subspace's

    def attach(self, optimizer, group, names):
        """Prepare for a new group; names of its parameters. An older optimizer's hooks on them are removed."""
        for param in group["params"]:
            _release(param, self)

    def of(self, group):
        """[(parameter, gradient)] of what has one."""
        return [(p, p.grad) for p in group["params"] if p.grad is not None]

    def begin(self, optimizer):
        """A step begins."""

    def plain_step(self, optimizer, group, params, grads, states, lr, guards):
        optimizer.inner.plain_step(group, params, grads, states, lr, guards)

    def low_rank_step(self, optimizer, group, params, grads, states, lr, left, guards):
        subspace = optimizer.subspace
        if group["refresh"] == "now":
            subspace.refresh(group, grads, states, lr, left)
            self._update(optimizer, group, params, grads, states, lr, left, guards)
            return
        omegas = [subspace.sketch_directions(p, s) for p, s in zip(params, states)]
        sketches = [None if omega is None else subspace.sketch(g, omega, left) for g, omega in zip(grads, omegas)]
        self._update(optimizer, group, params, grads, states, lr, left, guards)
        subspace.refresh_from_sketches(group, sketches, states, lr, left)

    def _update(self, optimizer, group, params, grads, states, lr, left, guards):
        optimizer.inner.low_rank_step(group, params, grads, states, lr, left, guards)

    def clip(self, optimizer, max_norm):
        """Scale all gradients by the norm of the low-rank and the plain ones; returns it."""
        grads, measured = [], []
        for group in optimizer.param_groups:
            pairs = self.of(group)
            grads += [grad for _, grad in pairs]
            if "rank" not in group:
                measured += [grad for _, grad in pairs]
                continue
            if group["refresh"] != "next":
                raise ValueError("clipping by the low-rank norm needs refresh='next': a basis must be known before its step")
            optimizer._init_state()
            for param, grad in pairs:
                state = optimizer.state[param]
                measured.append(torch.ops.lowrank.project(grad.contiguous(), state["basis"], left=state["left"]))
        return scale_to_norm_(grads, gradient_norms(measured), max_norm) if grads else torch.zeros(())

    def finish(self, optimizer):
        """A step ends."""

    def zero(self):
        """zero_grad was called."""

    def loaded(self, optimizer):
        """load_state_dict was called."""

    def release(self, optimizer):
        """Remove hooks and coefficients."""

    def memory(self):
        """Bytes by category of what is held beside the state."""
        return {}


class _Hooked(AtStep):
    """Serves the matrices of an optimizer by one hook that runs after a gradient is accumulated."""

    served_by_hooks = True

    def __init__(self):
        self._optimizer = None  # weak: a hook must not keep an optimizer alive
        self._handles = {}
        self._released = False

    def __getstate__(self):
        return {**self.__dict__, "_optimizer": None, "_handles": {}}

    def bind(self, optimizer):
        """Serve `optimizer`: at construction, and again in a copy, whose weights have no hooks yet."""
        if self._optimizer is not None:
            raise ValueError("an object given as per_layer serves one optimizer, got it for a second one")
        self._optimizer = weakref.ref(optimizer)

    def serve(self, weight):
        _release(weight, self)
        frozen = not weight.requires_grad
        # A hook needs requires_grad once, and then also serves a weight that is unfrozen later.
        weight.requires_grad_(True)
        self._handles[weight] = weight.register_post_accumulate_grad_hook(self._hook)
        weight.requires_grad_(not frozen)
        _SERVED[weight] = weakref.ref(self)

    def drop(self, weight):
        self._handles.pop(weight).remove()
        self._released = True

    def release(self, optimizer):
        for weight in list(self._handles):
            self.drop(weight)
            _SERVED.pop(weight, None)

    @torch.no_grad()
    def _hook(self, weight):
        optimizer = self._optimizer()
        if optimizer is None:
            return  # gone: an ordinary gradient again
        grad, weight.grad = weight.grad, None
        if grad is not None:
            self._take(optimizer, weight, _dense(weight, grad))

    def begin(self, optimizer):
        if self._released:
            raise RuntimeError("the gradients of these weights are no longer this optimizer's: it was released, or a newer "
                               "optimizer was built for them")


class Accumulate(_Hooked):
    """per_layer="accumulate": gradients are projected as soon as they exist, and R accumulates.

    `coefficient.grad += project(W.grad); W.grad = None`, once a backward. All micro-batches between two steps share one basis;
    a basis that is due comes from their accumulated sketch and serves from the next step on (refresh='next', which see).

    Args:
        dtype: of the accumulators, torch.float32 or torch.bfloat16 (rounded once a micro-batch).
        model: that holds the coefficients; that of param_groups(model) if its groups are given as they are.

    The accumulators cost r*n (left) or m*r elements a matrix, until zero_grad; in a step whose end is due for a refresh, the
    sketch of the matrix is as large again.
    """

    def __init__(self, dtype=torch.float32, model=None):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype of the accumulators must be float32 or bfloat16, got {dtype}")
        super().__init__()
        self.defaults = {"refresh": "next"}
        self.dtype = dtype
        self.model = model
        self.coefficients = {}
        self._window = {}  # weight -> its sketch, or None: what has had a gradient since the last step
        self._stepped = {}  # weight -> which gradient the last step used

    def __getstate__(self):
        return {**super().__getstate__(), "_window": {}, "_stepped": {}}

    def bind(self, optimizer):
        super().bind(optimizer)
        for weight in self.coefficients:
            self.serve(weight)

    def attach(self, optimizer, group, names):
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        if not hasattr(optimizer.inner, "subspace_step"):
            raise ValueError(f"per_layer='accumulate' needs a rule that can start from R, got {type(optimizer.inner).__name__}")
        if self.model is None:
            raise ValueError("per_layer='accumulate' needs the model: give the groups of param_groups(model) as they are, or "
                             "per_layer=Accumulate(model=model)")
        if group["refresh"] != "next":
            raise ValueError(f"refresh must be 'next' with per_layer='accumulate', got {group['refresh']!r}")
        _expect_one_process()
        where = {p: name for name, p in self.model.named_parameters()}
        for name, weight in zip(names, group["params"]):
            if weight not in where:
                raise ValueError(f"{name} is not a parameter of the model")
        ignored = list(getattr(self.model, "_ddp_params_and_buffers_to_ignore", []))
        for weight in list(group["params"]):
            left, shape = optimizer.subspace.low_rank_shape(group, weight)
            coefficient = self.coefficients[weight] = _coefficient(shape, self.dtype, weight.device)
            path, _, name = where[weight].rpartition(".")
            owner = self.model.get_submodule(path)
            if not hasattr(owner, CONTAINER):
                owner.add_module(CONTAINER, LowRankGradients())
            getattr(owner, CONTAINER).register_parameter(name, coefficient)
            full_name = ".".join(filter(None, (path, CONTAINER, name)))
            group["params"].append(coefficient)
            if "param_names" in group:
                group["param_names"].append(full_name)
            ignored += [where[weight], full_name]
            self.serve(weight)
        # DDP would hand the weights a zero gradient of their size, and cannot broadcast into an expanded tensor.
        self.model._ddp_params_and_buffers_to_ignore = ignored

    def drop(self, weight):
        super().drop(weight)
        coefficient = self.coefficients.pop(weight)
        coefficient.grad = None
        for owner in list(self.model.modules()):
            held = owner._modules.get(CONTAINER)
            for name in [name for name, p in held._parameters.items() if p is coefficient] if held is not None else ():
                delattr(held, name)
                if not held._parameters:
                    delattr(owner, CONTAINER)

    def release(self, optimizer):
        super().release(optimizer)
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if not isinstance(p, Coefficient)]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in kept]

    def _take(self, optimizer, weight, grad):
        if not optimizer.state[weight]:
            optimizer._init_state(weight)
        state, coefficient = optimizer.state[weight], self.coefficients[weight]
        if weight not in self._window:
            self._open(optimizer, weight, coefficient, state)
        sketch, left = self._window[weight], state["left"]
        low_rank = torch.ops.lowrank.project(grad, state["basis"], left=left)
        if sketch is not None:
            sketch.add(optimizer.subspace.sketch(grad, sketch.omega, left), coefficient.grad)
        if coefficient.grad is None:
            coefficient.grad = low_rank.to(self.dtype)
        else:
            coefficient.grad.add_(low_rank)
        if sketch is not None:
            sketch.version = coefficient.grad._version

    def _open(self, optimizer, weight, coefficient, state):
        """The first gradient of this weight since the last step."""
        _expect_one_process()
        self._expect_new(weight, coefficient)
        self._fit(weight, coefficient, state)
        omega = optimizer.subspace.sketch_directions(weight, state)
        self._window[weight] = None if omega is None else _Sketch(omega)

    def _expect_new(self, weight, coefficient):
        if coefficient.grad is not None and self._stepped.get(weight) == _identity(coefficient.grad):
            raise RuntimeError("the last step's low-rank gradients are still there, and their basis may have changed since: "
                               "call zero_grad() after step()")

    def _fit(self, weight, coefficient, state):
        """A model that was moved, cast or copied carries its coefficients along as full tensors; a loaded state may have
        another rank."""
        shape = low_rank_shape(weight, state["basis"], state["left"])
        if (coefficient.shape, coefficient.dtype, coefficient.device) != (shape, self.dtype, weight.device) or (
                coefficient.untyped_storage().nbytes() > coefficient.element_size()):
            coefficient.grad = None
            coefficient.data = _zero(shape, self.dtype, weight.device)

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
                self._hook(weight)
            elif weight not in self._window:
                self._expect_new(weight, coefficient)

    def low_rank_step(self, optimizer, group, params, grads, states, lr, left, guards):
        if self.dtype == torch.float32:
            optimizer.inner.subspace_step(group, params, grads, states, lr, left, guards)
        else:
            for param, grad, state in zip(params, grads, states):  # one fp32 copy at a time
                optimizer.inner.subspace_step(group, [param], [grad.float()], [state], lr, left, guards)
        sketches = [self._window.get(param) for param in params]
        sketches = [None if sketch is None else sketch.total for sketch in sketches]
        optimizer.subspace.refresh_from_sketches(group, sketches, states, lr, left)

    def clip(self, optimizer, max_norm):
        self.begin(optimizer)
        grads = [grad for group in optimizer.param_groups for _, grad in self.of(group)]
        return scale_to_norm_(grads, gradient_norms(grads), max_norm) if grads else torch.zeros(())

    def finish(self, optimizer):
        self._window.clear()
        self._stepped = {w: _identity(c.grad) for w, c in self.coefficients.items() if c.grad is not None}

    def zero(self):
        self._window.clear()

    def loaded(self, optimizer):
        """Gradients that were projected on another basis are dropped."""
        self._window.clear()
        self._stepped.clear()
        for coefficient in self.coefficients.values():
            coefficient.grad = None
        for group in optimizer.param_groups:
            if "rank" in group:
                group["refresh"] = "next"

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


class InBackward(_Hooked):
    """per_layer="in_backward": a matrix takes its step inside backward, and its gradient is freed at once.

    One backward a step: no accumulation, no GradScaler. optimizer.step() only finishes the plain parameters.

    Args:
        max_norm: clip by the norm of the previous step's gradients, low-rank and plain (this one's is not known before its
            backward ends). The first step is not clipped. None: no clipping.
    """

    def __init__(self, max_norm=None):
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}")
        super().__init__()
        self.max_norm = max_norm
        self._done = set()  # weights that took their step since the last optimizer.step()
        self._factors = {}  # device -> what this step's gradients are multiplied by

    def __getstate__(self):
        return {**super().__getstate__(), "_done": set(), "_factors": {}}

    def bind(self, optimizer):
        super().bind(optimizer)
        for group in getattr(optimizer, "param_groups", ()):
            if "rank" in group:
                for weight in group["params"]:
                    self.serve(weight)

    def attach(self, optimizer, group, names):
        if self.max_norm is not None and not hasattr(optimizer.inner, "subspace_step"):
            raise ValueError(f"max_norm needs a rule that can start from R, got {type(optimizer.inner).__name__}")
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        _expect_one_process()
        for weight in group["params"]:
            self.serve(weight)

    def _take(self, optimizer, weight, grad):
        if weight in self._done:
            raise RuntimeError("a second backward before step(): per_layer='in_backward' cannot accumulate gradients, each "
                               "backward is a step; use per_layer='accumulate'")
        _expect_one_process()
        group = optimizer._group_of(weight)
        if optimizer.nonfinite == "raise":
            optimizer._expect_finite(weight, grad)
        if not optimizer.state[weight]:
            optimizer._init_state(weight)
        state = optimizer.state[weight]
        guards = optimizer._guards(weight.device)
        self.low_rank_step(optimizer, group, [weight], [grad], [state], optimizer._rate(group), state["left"], guards)
        self._done.add(weight)

    def _update(self, optimizer, group, params, grads, states, lr, left, guards):
        if self.max_norm is None:
            return super()._update(optimizer, group, params, grads, states, lr, left, guards)
        low_rank = [torch.ops.lowrank.project(g, s["basis"], left=left) for g, s in zip(grads, states)]
        guards = {**guards, "grad_scale": self._factor(optimizer, params[0].device)}
        self._remember(low_rank, states)
        optimizer.inner.subspace_step(group, params, low_rank, states, lr, left, guards)

    def plain_step(self, optimizer, group, params, grads, states, lr, guards):
        if self.max_norm is not None:
            guards = {**guards, "grad_scale": self._factor(optimizer, params[0].device)}
            self._remember(grads, states)
        super().plain_step(optimizer, group, params, grads, states, lr, guards)

    def _remember(self, grads, states):
        for norm, state in zip(gradient_norms(grads), states):
            state["norm"] = torch.where(norm.isfinite(), norm, 0.0)

    def _factor(self, optimizer, device):
        """Clipping by the norm of the previous step, found before any gradient of this one is remembered."""
        if device not in self._factors:
            if not self._factors:
                norms = [s["norm"] for s in optimizer.state.values() if "norm" in s]
                self._norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms])) if norms else (
                    torch.zeros((), dtype=torch.float64, device=device))
            self._factors[device] = clip_factor(self._norm.to(device), self.max_norm)
        return self._factors[device]

    def of(self, group):
        if "rank" not in group:
            return super().of(group)
        pairs = super().of(group)  # put there by hand, or by DDP after the hook
        if any(weight in self._done for weight, _ in pairs):
            raise RuntimeError("a weight got a second gradient after its step in backward: per_layer='in_backward' cannot run "
                               "under DistributedDataParallel")
        return pairs

    def begin(self, optimizer):
        super().begin(optimizer)
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError("per_layer='in_backward' takes no GradScaler: its matrices have already taken their step, on "
                               "scaled gradients; use per_layer='accumulate', or train in bfloat16 without one")

    def clip(self, optimizer, max_norm):
        raise ValueError("per_layer='in_backward' has no gradients left to clip: give per_layer=InBackward(max_norm=...)")

    def finish(self, optimizer):
        if self.max_norm is not None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is None and param not in self._done and "norm" in optimizer.state[param]:
                        optimizer.state[param]["norm"].zero_()
        self.zero()

    def zero(self):
        self._done.clear()
        self._factors.clear()

    def loaded(self, optimizer):
        self.zero()


MODES = {"accumulate": Accumulate, "in_backward": InBackward}


def resolve(per_layer, groups):
    """The part for an argument per_layer: None, a name of MODES, or an Accumulate or InBackward. groups: of param_groups."""
    if per_layer is None:
        return AtStep()
    part = per_layer
    if not isinstance(part, _Hooked):
        if not isinstance(part, str) or part not in MODES:
            raise ValueError(f"per_layer must be None, {', '.join(MODES)}, an Accumulate or an InBackward, got {per_layer!r}")
        part = MODES[part]()
    if isinstance(part, Accumulate) and part.model is None:
        part.model = getattr(groups, "model", None)
    return part


def without_coefficients(optimizer, state_dict):
    """A state_dict whose groups leave the coefficients out; the numbers of the weights stay as they are."""
    groups = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        count = len(weights(group))
        saved = {**saved, "params": saved["params"][:count]}
        if "param_names" in saved:
            saved["param_names"] = saved["param_names"][:count]
        groups.append(saved)
    return {**state_dict, "param_groups": groups}


def with_coefficients(optimizer, state_dict):
    """The inverse for load_state_dict, which wants as many parameters as the optimizer has."""
    groups = []
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"])):
        count = len(weights(group))
        if len(saved["params"]) == count:
            rest = range(count, len(group["params"]))
            saved = {**saved, "params": [*saved["params"], *((CONTAINER, g, i) for i in rest)]}
        if "param_names" in saved and "param_names" in group:
            saved = {**saved, "param_names": [*saved["param_names"][:count], *group["param_names"][count:]]}
        groups.append(saved)
    return {**state_dict, "param_groups": [*groups, *state_dict["param_groups"][len(groups):]]}


def _identity(grad):
    return grad.data_ptr(), grad._version


def _dense(param, grad):
    if grad.is_sparse:
        raise ValueError(f"gradients must be dense, got a sparse one for a parameter of shape {tuple(param.shape)}")
    return grad.detach().contiguous()


def _release(weight, newest):
    """Remove the hook of an older optimizer: the newest one of a weight serves it."""
    older = _SERVED.pop(weight, None)
    older = None if older is None else older()
    if older is not None and older is not newest and weight in older._handles:
        older.drop(weight)


def _expect_one_process():
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(f"per_layer runs in one process, got {distributed.get_world_size()}: each rank would project its own "
                           "gradient before it is averaged")
