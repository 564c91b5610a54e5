"""per_layer="in_backward": a matrix takes its step inside backward, and its gradient is freed at once."""

import torch

from lowrank_sys.optim.clip import clip_factor, gradient_norms
from lowrank_sys.optim.gradients import Hooked, expect_one_process


class InBackward(Hooked):
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
        if "rank" not in group:
            return super().attach(optimizer, group, names)
        expect_one_process()
        for weight in group["params"]:
            self.serve(weight)

    def _take(self, optimizer, weight, grad):
        if weight in self._done:
            raise RuntimeError(
                "a second backward before step(): per_layer='in_backward' cannot accumulate gradients, each "
                "backward is a step; use per_layer='accumulate'"
            )
        expect_one_process()
        group = optimizer._group_of(weight)
        if optimizer.nonfinite == "raise":
            optimizer._expect_finite(weight, grad)
        if not optimizer.state[weight]:
            optimizer._init_state(weight)
        state = optimizer.state[weight]
        guards = optimizer._guards(weight.device)
        self.low_rank_step(optimizer, group, [weight], [grad], [state], optimizer._rate(group), state["left"], guards)
        self._done.add(weight)

    def update(self, optimizer, group, params, grads, states, lr, left, guards):
        if self.max_norm is None:
            return super().update(optimizer, group, params, grads, states, lr, left, guards)
        factor = self._factor(optimizer, params[0].device)
        low_rank = [optimizer.subspace.measured(group, g, s) for g, s in zip(grads, states)]
        self._remember(low_rank, states)
        if optimizer.residual.starts_from_low_rank(optimizer.inner):
            guards = {**guards, "grad_scale": factor}
            optimizer._subspace_step(group, params, low_rank, states, lr, left, guards)
        else:
            torch._foreach_mul_(grads, factor)
            super().update(optimizer, group, params, grads, states, lr, left, guards)

    def plain_step(self, optimizer, group, params, grads, states, lr, guards):
        if self.max_norm is not None:
            factor = self._factor(optimizer, params[0].device)
            self._remember(grads, states)
            torch._foreach_mul_(grads, factor)
        super().plain_step(optimizer, group, params, grads, states, lr, guards)

    def _remember(self, grads, states):
        for norm, state in zip(gradient_norms(grads), states):
            state["norm"] = torch.where(norm.isfinite(), norm, 0.0)

    def _factor(self, optimizer, device):
        """Clipping by the norm of the previous step, found before any gradient of this one is remembered."""
        if device not in self._factors:
            if not self._factors:
                norms = [s["norm"] for s in optimizer.state.values() if "norm" in s]
                self._norm = (
                    torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
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
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
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
