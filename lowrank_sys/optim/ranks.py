"""What the processes that train one model do together with its low-rank gradients."""

import weakref

import torch
from torch.utils._pytree import tree_leaves

from lowrank_sys.nn.quant_weight import tensors_of


def mean_over(world, tensors, makes):
    """[the mean of each of `tensors` over the ranks, in place where there is one].

    A rank that has None counts as zeros, which `makes` makes, one function each; None where no rank has one. What a rank lacks
    makes the host wait for the device.
    """
    if not tensors:
        return []
    here = [tensor is not None for tensor in tensors]
    filled = [make() if tensor is None else tensor for tensor, make in zip(tensors, makes)]
    share = torch.tensor(here, dtype=torch.float32).to(filled[0].device)
    world.mean_([*filled, share])
    if all(here):
        return filled
    return [tensor if part > 0 else None for tensor, part in zip(filled, share.tolist())]


def copy_weights(world, weights):
    """Give all ranks the weights of rank 0, where DistributedDataParallel is told to leave them alone."""
    world.from_first_([values for weight in weights for values in tensors_of(weight)])


def copy_refreshed(world, pipeline, refreshed):
    """Give all ranks what rank 0's refresh wrote into [(group, state)]: one sketch has one basis, to the bit, on one kind of
    processor and library alone."""
    tensors, numbers, on_host = [], [], pipeline.subspace.on_host
    for group, state in refreshed:
        keys = pipeline.subspace.categories if group["moments"] == "keep" else state
        found = [key for key in sorted(keys & state.keys()) if isinstance(state[key], torch.Tensor)]
        tensors += [state[key] for key in found if key not in on_host]
        if "gap" in state:  # which follows from how far the basis turned
            numbers += [state[key] for key in found if key in on_host and key != "missed"]
    world.from_first_(tensors)
    if numbers:
        sent = torch.stack(numbers).to(tensors[0].device)
        world.from_first_([sent])
        for number, value in zip(numbers, sent.cpu()):
            number.copy_(value)


class AfterBackward:
    """Calls `part.method()` at the end of each backward of `model` in which DistributedDataParallel averages gradients: after any
    forward by it but one within no_sync().

    part: kept weakly. `synced` is what the last forward said.
    """

    def __init__(self, model, part, method):
        self.model, self.part, self.method = weakref.ref(model), weakref.ref(part), method
        self.synced = self._queued = False
        self.handle = model.register_forward_hook(self)

    def __reduce__(self):
        return _no_hook, ()

    def __deepcopy__(self, memo):
        return _nothing

    @torch.compiler.disable
    def __call__(self, module, args, output):
        if module is not self.model() or not torch.is_grad_enabled():
            return
        ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        self.synced, self._queued = ddp is not None and ddp.require_backward_grad_sync, False
        if self.synced:
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(self.begun)

    def begun(self, _=None):
        """A backward has begun, as the hooks of outputs and of weights tell; nothing outside of one."""
        if self.synced and not self._queued and torch._C._current_graph_task_id() != -1:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self):
        self._queued, part = False, self.part()
        if part is not None:
            getattr(part, self.method)()


def _nothing(*_):
    """The hook of a copy, whose gradients are nobody's."""


def _no_hook():
    return _nothing
