"""CapturedStep: the step of an optimizer as one CUDA graph. Bases that are due are refreshed before the replay."""

import torch

from lowrank_sys.optim.names import name_of
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.shards import sharded
from lowrank_sys.optim.weight import weight_store

# Group keys that a graph does not hold: what it reads anew at every step, and what others note there.
NOT_CAPTURED = ("params", "param_names", "lr", "initial_lr")


class StepInParts:
    """optimizer.step() as `before`, `body` and `after`: the same kernels on the same numbers, so the same bits.

    `before` and `after` keep the schedule of the bases: they read countdowns on the host and choose what is due. `body`, all
    else, is what a graph can hold: it reads no value on the host and makes nothing that stays. Rates and a GradScaler's numbers
    are tensors on `device`, which `before` fills without waiting for it.
    """

    def __init__(self, optimizer, device):
        self._optimizer = optimizer
        self._device = device
        self._rates = []
        self._found_inf = torch.zeros((), device=device)
        self._grad_scale = torch.ones((), device=device)
        self._guarded = False
        self._batches = []

    def before(self, grad_scale=None, found_inf=None):
        """Refresh what is due; grad_scale, found_inf: a GradScaler's, None without one."""
        optimizer = self._optimizer
        optimizer.gradients.begin(optimizer)
        self._fill(grad_scale, found_inf)
        self._batches = list(optimizer.all_batches(*((self._grad_scale, self._found_inf) if self._guarded else ())))
        for group, batch in self._batches:
            optimizer.pipeline.choose(batch, optimizer.rate(group))

    def _fill(self, grad_scale, found_inf):
        rates = [self._optimizer.rate(group) for group in self._optimizer.param_groups]
        while len(self._rates) < len(rates):
            self._rates.append(torch.empty_like(rates[len(self._rates)], device=self._device))
        self._guarded = found_inf is not None or grad_scale is not None
        for mine, value in zip((*self._rates, self._found_inf, self._grad_scale), (*rates, found_inf, grad_scale)):
            if value is None:
                mine.fill_(0.0 if mine is self._found_inf else 1.0)
            elif value.device == mine.device:
                mine.copy_(value.reshape(()))
            else:
                mine.fill_(value.item())  # a number of the host's: a copy from there would wait

    def body(self):
        """Step all that has a gradient, on the bases that are there."""
        optimizer = self._optimizer
        rates = {id(group): rate for group, rate in zip(optimizer.param_groups, self._rates)}
        # made anew: the reciprocal of the scale is part of what is captured
        for group, batch in optimizer.all_batches(*((self._grad_scale, self._found_inf) if self._guarded else ())):
            optimizer.pipeline.update(batch, rates[id(group)])

    def after(self):
        """With refresh='next' choose the bases of the next step."""
        optimizer = self._optimizer
        for group, batch in self._batches:
            optimizer.pipeline.renew(batch, optimizer.rate(group))
        self._batches = []
        optimizer.gradients.finish(optimizer)


class CapturedStep:
    """optimizer.step() with its launches in one CUDA graph, to the bit; refreshes of bases run before the replay.

        step = CapturedStep(optimizer)
        for batch in batches:
            step.zero_grad()
            loss(batch).backward()
            step.step()
            scheduler.step()

    The first step runs eagerly, the second is captured, all later ones are replayed. Gradients must keep their addresses: clear
    them with `zero_grad()` of this object, or with set_to_none=False, and write static ones in place. The rate of a group may be
    a number or a tensor, and change at every step; other hyper-parameters are part of the graph. With a GradScaler hand this
    object to `unscale_` and `step` in the optimizer's place. Schedulers, checkpoints and clipping take the optimizer itself.
    After its load_state_dict the next step is eager again, and the one after it captured.

    Temporaries of the step stay reserved as the graph's own memory. A rule that reads the device at a refresh (cos_threshold)
    makes the host wait in a step that refreshes, as without a graph.

    Args:
        optimizer: one of lowrank_sys.optim with all parameters on one CUDA device, dense gradients until the step (per_layer=None)
            and nonfinite='skip'. ValueError for any other.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of synchronising

    def __init__(self, optimizer):
        device = _device_of(optimizer)
        self.optimizer = optimizer
        self._device = device
        self._parts = StepInParts(optimizer, device)
        self._graph = None
        self._captured = None  # what the graph takes as given, from the eager step on
        optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def _forget(self):
        self._graph = self._captured = None

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=False):
        """Clear the gradients in place, so that they keep their addresses."""
        if set_to_none:
            raise ValueError("set_to_none must be False for a captured step: gradients must keep their addresses")
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that had a gradient in the first step. Nothing waits for the device.

        RuntimeError that names what a captured step takes as given and that changed: the address of a gradient or a weight, a
        hyper-parameter, a GradScaler that came or went.
        """
        if closure is not None:
            raise ValueError("closure must be None for a captured step: call backward() before it")
        guards = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        given = _given(self.optimizer, guards)
        with torch.cuda.device(self._device):
            if self._captured is None:
                self._captured, run = given, self._parts.body
            else:
                _expect_same(self.optimizer, self._captured, given)
                run = self._replay
            self._parts.before(*guards)
            run()
            self._parts.after()
        self.optimizer._opt_called = True  # schedulers ask for it

    def _replay(self):
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders' threads may go on
                self._parts.body()
            self._graph = graph
        self._graph.replay()


def _device_of(optimizer):
    """The device of a step that can be captured; ValueError for one that cannot."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"optimizer must be one of lowrank_sys.optim to be captured, got {type(optimizer).__name__}")
    if optimizer.gradients.served_by_hooks:
        raise ValueError(
            f"optimizer must have per_layer=None to be captured, got {type(optimizer.gradients).__name__}: its "
            "gradients are used in backward"
        )
    if optimizer.nonfinite != "skip":
        raise ValueError(
            f"optimizer must have nonfinite='skip' to be captured, got {optimizer.nonfinite!r}: it reads every gradient"
        )
    if optimizer.pipeline.remainder.feeds_back:
        raise ValueError(f"optimizer must have no error feedback to be captured, got {type(optimizer).__name__}: its step reads it")
    if not optimizer.pipeline.subspace.capturable:
        raise ValueError(
            f"optimizer must make no basis on the host's word to be captured, got {type(optimizer).__name__}: its step reads keys"
        )
    if not optimizer.pipeline.schedule.static:
        raise ValueError(f"optimizer must train everything always to be captured, got {type(optimizer).__name__}")
    if any(map(sharded, optimizer.layouts.values())):
        raise ValueError("optimizer must have whole weights to be captured, got sharded ones, whose gradients move")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError("optimizer must have no step hooks to be captured: a replay does not call them")
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        got = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"optimizer must have all parameters on one CUDA device to be captured, got {got}")
    return devices.pop()


def _given(optimizer, guards):
    """What a graph takes as given: (hyper-parameters of the groups, addresses by parameter, whether there is a GradScaler)."""
    hyper = [{key: value for key, value in group.items() if key not in NOT_CAPTURED} for group in optimizer.param_groups]
    addresses = [
        (*(t.data_ptr() for ts in weight_store(p).tensors([p]) for t in ts), None if p.grad is None else p.grad.data_ptr())
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return hyper, addresses, any(guard is not None for guard in guards)


def _expect_same(optimizer, captured, given):
    if captured == given:
        return
    (hyper, addresses, guarded), (hyper_now, addresses_now, guarded_now) = captured, given
    if guarded != guarded_now:
        raise RuntimeError(
            f"a captured step began {'with' if guarded else 'without'} a GradScaler and goes on so: build CapturedStep anew"
        )
    if len(addresses) != len(addresses_now):
        raise RuntimeError(
            f"a captured step began with {len(addresses)} parameters, got {len(addresses_now)}: build CapturedStep anew"
        )
    names = [name_of(group, g, i) for g, group in enumerate(optimizer.param_groups) for i in range(len(group["params"]))]
    for name, (*weight, grad), (*weight_now, grad_now) in zip(names, addresses, addresses_now):
        if weight != weight_now:
            raise RuntimeError(f"the weight of {name} moved since the step was captured: build CapturedStep anew")
        if grad != grad_now:
            how = "appeared" if grad is None else "is gone" if grad_now is None else "moved"
            raise RuntimeError(
                f"the gradient of {name} {how} since the first captured step: gradients must keep their addresses, "
                "clear them with zero_grad(set_to_none=False)"
            )
    for g, (before, now) in enumerate(zip(hyper, hyper_now)):
        for key in before:
            if before[key] != now.get(key):
                raise RuntimeError(
                    f"{key} of group {g} was {before[key]!r} when the step was captured, got {now.get(key)!r}: "
                    "build CapturedStep anew"
                )
