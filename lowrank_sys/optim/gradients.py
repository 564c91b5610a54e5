"""When the gradient of a matrix is used: at the step, or by a hook that runs as soon as it exists."""

import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_sys.distributed.world import World
from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.optim.shards import experts_here, here, over_shards, shard_here
from lowrank_sys.subspace.shards import shard_of

# weight -> weak reference to the part whose hook takes its gradients: the newest optimizer of a weight serves it.
_SERVED = WeakTensorKeyDictionary()


class AtStep:
    """Gradients stay whole until the step, as in any optimizer; with several processes DistributedDataParallel averages them.

    Args:
        process_group: of torch.distributed, of those who train the same parameters; all by default.
    """

    served_by_hooks = False
    takes_low_rank = False  # whether it serves layers whose backward gives R
    sharded = True  # whether it serves weights whose rows lie on several processes
    defaults = {}  # group keys that differ from the subspace's

    def __init__(self, process_group=None):
        self.world = World(process_group)

    def describe(self):
        """The argument per_layer that is this mode, in words."""
        return None

    def know(self, groups):
        """See the parameter groups, of which those of param_groups have their `model`."""

    def check(self, optimizer):
        """Raise a ValueError for an optimizer whose low-rank step this mode cannot serve."""

    def attach(self, optimizer, group, names):
        """Prepare for a new group; names of its parameters. An older optimizer's hooks on them are removed."""
        for param in group["params"]:
            _release(param, self)

    def ready(self, optimizer):
        """All groups of a new optimizer are there."""

    def of(self, group):
        """[(parameter, gradient)] of what has one."""
        return [(p, p.grad) for p in group["params"] if p.grad is not None]

    projected = False  # whether `of` gives R for a group with a rank

    def complete(self, state, param):
        """Add to a state what a step of this mode writes there."""

    def begin(self, optimizer):
        """A step begins."""

    def step(self, optimizer, batch, lr):
        """Take the step of a lowrank_sys.optim.pipeline.Batch."""
        optimizer.pipeline.step(batch, lr)

    def clip(self, optimizer, max_norm):
        """Scale all gradients by the norm of the low-rank and the plain ones; returns it."""
        grads, measured, places = [], [], []
        for group in optimizer.param_groups:
            pairs = self.of(group)
            mine = [here(optimizer, param, grad) for param, grad in pairs]
            grads += mine
            if "rank" not in group:
                measured += mine
                places += [shard_here(optimizer, param) for param, _ in pairs]
                continue
            measure = optimizer.pipeline.subspace.measured
            for batch in optimizer.batches(group, [pair for pair in pairs if not experts_here(optimizer, pair[0])]):
                if batch.has_subspace and group["refresh"] != "next":
                    raise ValueError("clipping by the low-rank norm needs refresh='next': a basis must be known before its step")
                measured += [measure(group, g, s) for g, s in zip(batch.gradients, batch.states)]
                places += [shard_of(state, 1) for state in batch.states]
            for pair in pairs:
                if experts_here(optimizer, pair[0]):  # of which other processes have other numbers: one norm for all of a weight
                    (batch,) = optimizer.batches(group, [pair])
                    some = [measure(group, g, s) for g, s in zip(batch.gradients, batch.states)]
                    measured.append(torch.cat([torch.where(r.isfinite().all(), r, 0).flatten() for r in some]))
                    places.append(shard_here(optimizer, pair[0]))
        if not grads:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return scale_to_norm_(grads, over_shards(gradient_norms(measured), places), max_norm)

    def finish(self, optimizer):
        """A step ends."""

    def zero(self):
        """zero_grad was called."""

    def check_loaded(self, groups):
        """Raise a ValueError for saved groups that this mode cannot go on with."""

    def loaded(self, optimizer):
        """load_state_dict was called."""

    def release(self, optimizer):
        """Remove hooks and coefficients."""

    def held(self, optimizer):
        """Yield (category, tensor) of what is held beside the state."""
        return ()

    def memory(self):
        """Bytes by category of what is held beside the state."""
        return {}


class Hooked(AtStep):
    """Serves the matrices of an optimizer by one hook that runs after a gradient is accumulated."""

    served_by_hooks = True
    sharded = False

    def __init__(self, process_group=None):
        super().__init__(process_group)
        self._optimizer = None  # weak: the optimizer holds this
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
        self._handles[weight] = self.hooks(weight)
        _SERVED[weight] = weakref.ref(self)

    def hooks(self, weight):
        """The handles of new hooks that serve a weight."""
        return [hooked(weight, weight.register_post_accumulate_grad_hook, WeakHook(self, "take"))]

    def drop(self, weight):
        for handle in self._handles.pop(weight):
            handle.remove()
        self._released = True

    def release(self, optimizer):
        for weight in list(self._handles):
            self.drop(weight)
            _SERVED.pop(weight, None)

    @torch.no_grad()
    def take(self, weight):
        """Use the gradient of a weight, and free it."""
        with torch._C.DisableTorchFunctionSubclass():
            grad, weight.grad = weight.grad, None
            if grad is not None:
                self.use(self.optimizer, weight, _dense(weight, grad))

    def use(self, optimizer, weight, grad):
        """What this mode does with a gradient that is complete."""
        raise NotImplementedError

    @property
    def optimizer(self):
        """None where it is gone."""
        return None if self._optimizer is None else self._optimizer()

    def serves(self, weight):
        return weight in self._handles

    def begin(self, optimizer):
        if self._released:
            raise RuntimeError(
                "the gradients of these weights are no longer this optimizer's: it was released, or a newer "
                "optimizer was built for them"
            )


def hooked(leaf, register, hook):
    """The handle of a hook. register: a method of the leaf that takes it; it needs requires_grad once, and then also serves a leaf
    that is unfrozen later."""
    frozen = not leaf.requires_grad
    leaf.requires_grad_(True)
    handle = register(hook)
    leaf.requires_grad_(not frozen)
    return handle


class WeakHook:
    """A hook that calls `part.method(*args, what it is given)`; it does not keep the part alive, and does nothing without its
    optimizer: then a gradient is an ordinary one."""

    def __init__(self, part, method, *args):
        self.part, self.method, self.args = weakref.ref(part), method, args

    def __call__(self, given):
        part = self.part()
        if part is not None and part.optimizer is not None:
            getattr(part, self.method)(*self.args, given)


def _dense(param, grad):
    if grad.is_sparse:
        raise ValueError(f"gradients must be dense, got a sparse one for a parameter of shape {tuple(param.shape)}")
    return grad.detach().contiguous()


def _release(weight, newest):
    """Remove the hook of an older optimizer: the newest one of a weight serves it."""
    older = _SERVED.pop(weight, None)
    older = None if older is None else older()
    if older is not None and older is not newest and older.serves(weight):
        older.drop(weight)
