"""APOLLO (Zhu et al., MLSys 2025, arXiv:2412.05270): Adam in a random subspace says how to scale the whole gradient."""

from lowrank_sys.optim.moments import MIN_8BIT_SIZE, Fp32, Plain8bit
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.remainder import ScaledGradient
from lowrank_sys.optim.rules import RatioAdam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate
from lowrank_sys.subspace.keys import Keyed


# Who keeps weights in INT8 has no room for fp32 moments of the embeddings.
@method("apollo", lr=2e-3, plain_lr=3e-3, scale=1.0, int8_options={"plain_8bit": True}, fine_tuning={"lr": 3e-4, "rank": 256})
@method(
    "apollo-mini", lr=2e-3, plain_lr=3e-3, rank=1, scale=128.0, keys={"scale_type": "tensor"}, int8_options={"plain_8bit": True}
)
class APOLLOAdamW(LowRankOptimizer):
    """W <- (1 - lr*wd) W - a sqrt(scale) s o G, with a = lr sqrt(1 - beta2^t) / (1 - beta1^t).

    s_j = |N_j| / |R_j| by channel, N = M / (sqrt(V) + eps) from the moments of R = project(G). The norm of s o G grows by at most
    1% a step (the norm-growth limiter). Groups without `rank` are plain AdamW. Group keys as apollo-torch's: `rank`,
    `update_proj_gap` (200), `scale` (1, or 128 with scale_type='tensor'), `proj_type`, `proj` (random | svd), `scale_type`
    (channel | tensor), and those of GaLoreAdamW; with proj='svd', `subspace` says how the singular directions are found.
    APOLLO-Mini is one factor for a whole matrix from rank 1: `param_groups(model, **APOLLOAdamW.mini)`.

    A random basis is never stored: the state holds its key of 32 bytes, and kernels make it from that. apollo-torch keeps
    it in memory, decays after the update and adds eps before bias correction.

    Args:
        params, lr, betas, weight_decay, nonfinite: as GaLoreAdamW.
        eps: added to sqrt(V), without bias correction in matrices.
        scale_front: multiply by sqrt(scale) before the limiter instead of after it.
        disable_nl: no norm-growth limiter.
        plain_8bit: moments of groups without `rank` in 8 bits, as GaLoreAdamW8bit's.
        per_layer: None | 'in_backward': the step needs the whole gradient.

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` fp32 (r, n) or (m, r), `key` int64 (4,) or `basis`, `limiter`, `step`,
    and the schedule.
    """

    # APOLLO-Mini: one scale a matrix, from a projection to one row or column.
    mini = {"rank": 1, "scale_type": "tensor", "scale": 128.0}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        scale_front: bool = False,
        disable_nl: bool = False,
        plain_8bit: bool = False,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if plain_8bit:
            defaults["min_8bit_size"] = MIN_8BIT_SIZE
        remainder = ScaledGradient(front=scale_front, limited=not disable_nl)
        moments = Plain8bit() if plain_8bit else Fp32()
        pipeline = Pipeline(RatioAdam(), subspace=Keyed(), remainder=remainder, moments=moments)
        super().__init__(params, pipeline, defaults, nonfinite, per_layer)

    def _set_defaults(self, group):
        if group.get("scale_type") == "tensor":
            group.setdefault("scale", self.mini["scale"])
        super()._set_defaults(group)
