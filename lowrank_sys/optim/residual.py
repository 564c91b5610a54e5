"""What happens to the part of the gradient that the subspace does not hold, G - back(R), and the fused op of the whole step.

A residual declares its group keys (`defaults`), keeps what it needs in the state (`categories`), and takes the low-rank step
with the moments and hyper-parameters of the inner rule, Adam.
"""

import torch

from lowrank_sys.optim.store import weight_store

# A norm may grow by this factor a step (Fira, section 3.3; APOLLO, section 4.2).
GROWTH = 1.01


def _field(states, key):
    return [state[key] for state in states]


class Dropped:
    """It is dropped, as in GaLore: the inner rule's own op takes the step."""

    defaults = {"scale": 0.25}
    categories = {}
    int4_basis = int8_gemm = True  # serves bases, or products, in these if the inner rule does

    def check(self, group):
        """Raise a ValueError that names a key with a value that is none."""

    def init(self, state, param):
        """Add this part's state for a matrix."""

    def starts_from_low_rank(self, inner):
        """Whether inner.subspace_step is the step: it needs nothing of G but R."""
        return hasattr(inner, "subspace_step")

    def writes_int8(self, inner):
        """Whether its op writes INT8 weights itself."""
        return getattr(inner, "int8_weights", False)

    def low_rank_step(self, inner, group, params, grads, states, lr, left, guards):
        inner.low_rank_step(group, params, grads, states, lr, left, guards)


class _FromGradient(Dropped):
    """The step needs G itself."""

    limited = False
    int4_basis = int8_gemm = False

    def starts_from_low_rank(self, inner):
        return False

    def writes_int8(self, inner):
        return False

    def init(self, state, param):
        if self.limited:
            state["limiter"] = torch.zeros((), dtype=torch.float32, device=param.device)

    def _limiters(self, states):
        return [_field(states, "limiter")] if self.limited else [[]]

    def _tensors(self, states, params, grads):
        return params, grads, *(_field(states, key) for key in ("basis", "exp_avg", "exp_avg_sq"))


class ScaledGradient(_FromGradient):
    """APOLLO: no back-projection, the whole gradient is scaled by channel (or as one) as Adam would scale R.

    Group keys: `scale`, `scale_type` ('channel' | 'tensor'). State of a matrix: `limiter`, the norm of the last update.

    Args:
        front: whether sqrt(scale) comes before the limiter.
        limited: whether the norm of an update is limited at all.
    """

    defaults = {"scale": 1.0, "scale_type": "channel"}
    categories = {"limiter": "counters"}

    def __init__(self, front=False, limited=True):
        self.front, self.limited = front, limited

    def check(self, group):
        if group["scale_type"] not in ("channel", "tensor"):
            raise ValueError(f"scale_type must be one of channel, tensor, got {group['scale_type']!r}")

    def low_rank_step(self, inner, group, params, grads, states, lr, left, guards):
        bases = [state["key"] if "key" in state else state["basis"] for state in states]
        store, ops = weight_store(params[0]), torch.ops.lowrank
        (ops.apollo_int8_step if store.int8 else ops.apollo_step).list(
            *store.tensors(params),
            grads,
            bases,
            _field(states, "exp_avg"),
            _field(states, "exp_avg_sq"),
            *self._limiters(states),
            _field(states, "step"),
            lr=lr,
            scale=group["scale"],
            left=left,
            per_tensor=group["scale_type"] == "tensor",
            scale_front=self.front,
            growth=GROWTH,
            **store.options(group, states),
            **inner.hyper(group),
            **guards,
        )

    def writes_int8(self, inner):
        return True


class ScaledResidual(_FromGradient):
    """Fira: it is scaled by channel as Adam scales R, and its norm is limited.

    Group key: `alpha`, the factor of back(). State of a matrix: `limiter`, the norm of the last scaled residual.
    """

    defaults = {"alpha": 0.25}
    categories = {"limiter": "counters"}
    limited = True

    def low_rank_step(self, inner, group, params, grads, states, lr, left, guards):
        torch.ops.lowrank.fira_step.list(
            *self._tensors(states, params, grads),
            *self._limiters(states),
            [],
            _field(states, "step"),
            lr=lr,
            alpha=group["alpha"],
            left=left,
            growth=GROWTH,
            **inner.hyper(group),
            **guards,
        )


class StateFree(_FromGradient):
    """FRUGAL: it takes a step without a state, signSGD or SGD.

    Group keys: `scale`, of the Adam step in the subspace; `residual_scale`, of the other.
    """

    defaults = {"scale": 1.0, "residual_scale": 1.0}

    def __init__(self, sign=True):
        self.sign = sign

    def low_rank_step(self, inner, group, params, grads, states, lr, left, guards):
        torch.ops.lowrank.frugal_step.list(
            *self._tensors(states, params, grads),
            _field(states, "step"),
            lr=lr,
            scale=group["scale"],
            residual_scale=group["residual_scale"],
            sign=self.sign,
            left=left,
            **inner.hyper(group),
            **guards,
        )
