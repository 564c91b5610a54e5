"""per_layer="in_backward": a matrix takes its step inside backward, and its gradient is freed at once."""

import torch

from lowrank_sys.optim.clip import clip_factor, gradient_norms
from lowrank_sys.optim.gradients import Hooked
from lowrank_sys.optim.shards import experts_here, over_shards
from lowrank_sys.subspace.matrices import count
from lowrank_sys.subspace.shards import shard_of


class InBackward(Hooked):
    """per_layer="in_backward": a matrix takes its step inside backward, and its gradient is freed at once.

    One backward a step: no accumulation, no GradScaler. optimizer.step() only finishes the plain parameters. With several
    processes for weights under fully_shard alone, which averages a gradient before its hooks run.

    Args:
        max_norm: clip by the norm of the previous step's gradients, low-rank and plain (this one's is not known before its
            backward ends). The first step is not clipped. None: no clipping.
    """

    sharded = True

    def __init__(self, max_norm: float | None = None) -> None:
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
        for group in optimizer.groups_so_far():
            if "rank" in group:
                for weight in group["params"]:
                    self.serve(weight)

    def attach(self, optimizer, group, names):
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        self._expect_averaged(optimizer, group["params"])
        for weight, name in zip(group["params"], names):
            if self.max_norm is not None and experts_here(optimizer, weight):
                raise ValueError(f"max_norm must be None where experts of {name} lie on several processes, got {self.max_norm}")
            self.serve(weight)

    def _expect_averaged(self, optimizer, weights):
        if self.world.size > 1 and any(weight not in optimizer.layouts for weight in weights):
            raise RuntimeError(
                f"per_layer='in_backward' runs in one process, got {self.world.size}: a matrix takes its step before its gradient "
                "is averaged over them; use per_layer='accumulate', fully_shard or project_model"
            )

    def use(self, optimizer, weight, grad):
        if weight in self._done:
            raise RuntimeError(
                "a second backward before step(): per_layer='in_backward' cannot accumulate gradients, each "
                "backward is a step; use per_layer='accumulate'"
            )
        self._expect_averaged(optimizer, [weight])
        group = optimizer.group_of(weight)
        optimizer.expect_finite(weight, grad)
        lr = optimizer.rate(group, weight.device)
        for batch in optimizer.batches(group, [(weight, grad)]):
            self.step(optimizer, batch, lr)
        self._done.add(weight)

    def step(self, optimizer, batch, lr):
        if self.max_norm is None:
            return super().step(optimizer, batch, lr)
        pipeline, factor = optimizer.pipeline, self._factor(optimizer, batch.params[0].device)
        pipeline.choose(batch, lr)
        if not batch.has_subspace:
            self._remember(batch.gradients, batch.states)
            torch._foreach_mul_(batch.gradients, factor)
            pipeline.update(batch, lr)
        else:
            subspace, from_low_rank = pipeline.subspace, pipeline.from_low_rank
            of = subspace.project if from_low_rank else subspace.measured
            low_rank = [of(batch.group, g, s) for g, s in zip(batch.gradients, batch.states)]
            self._remember(low_rank, batch.states)
            if from_low_rank:
                pipeline.update(batch.with_gradients(low_rank, projected=True, grad_scale=factor), lr)
            else:
                torch._foreach_mul_(batch.gradients, factor)
                pipeline.update(batch, lr)
        pipeline.renew(batch, lr)

    def _remember(self, grads, states):
        norms = over_shards(gradient_norms(grads), [shard_of(state, 1) for state in states])
        for norm, state in zip(norms, states):
            if "norm" not in state:
                state["norm"] = torch.zeros_like(norm)
            state["norm"].copy_(torch.where(norm.isfinite(), norm, 0.0))

    def complete(self, state, param):
        if self.max_norm is not None and "norm" not in state:
            state["norm"] = torch.zeros(count(param.shape), dtype=torch.float64, device=param.device)

    def _factor(self, optimizer, device):
        """Clipping by the norm of the previous step, found before any gradient of this one is remembered."""
        if device not in self._factors:
            if not self._factors:
                norms = [s["norm"] for s in optimizer.state.values() if "norm" in s]
                self._norm = (
                    torch.linalg.vector_norm(torch.cat([n.to(device).reshape(-1) for n in norms]))
                    if norms
                    else (torch.zeros((), dtype=torch.float64, device=device))
                )
            self._factors[device] = clip_factor(self._norm.to(device), self.max_norm)
        return self._factors[device]

    def of(self, group):
        if "rank" not in group:
            return super().of(group)
        pairs = super().of(group)  # put there by hand, or by DDP after the hook
        if any(weight in self._done for weight, _ in pairs):
            raise RuntimeError(
                "a weight got a second gradient after its step in backward: per_layer='in_backward' cannot run "
                "under DistributedDataParallel"
            )
        return pairs

    def begin(self, optimizer):
        super().begin(optimizer)
        if any(value is not None for value in optimizer.scaler()):
            raise RuntimeError(
                "per_layer='in_backward' takes no GradScaler: its matrices have already taken their step, on "
                "scaled gradients; use per_layer='accumulate', or train in bfloat16 without one"
            )

    def clip(self, optimizer, max_norm):
        raise ValueError("per_layer='in_backward' has no gradients left to clip: give per_layer=InBackward(max_norm=...)")

    def finish(self, optimizer):
        if self.max_norm is not None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is None and param not in self._done and "norm" in optimizer.state.get(param, ()):
                        optimizer.state[param]["norm"].zero_()
        self.zero()

    def zero(self):
        self._done.clear()
        self._factors.clear()

    def loaded(self, optimizer):
        self.zero()
