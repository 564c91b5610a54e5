"""FRUGAL (Zmushko et al. 2024, arXiv:2411.07837): AdamW in the subspace, signSGD in the rest of the gradient."""

from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.remainder import StateFree
from lowrank_sys.optim.rules import Adam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate
from lowrank_sys.subspace.orthonormal import Orthonormal
from lowrank_sys.subspace.rows import Rows


@method("frugal-columns", lr=5e-4, plain_lr=3e-3, scale=1.0, subspace="uniform", options={"choice": "columns"})
@method("frugal", lr=5e-4, plain_lr=3e-3, scale=1.0)
class FrugalAdamW(LowRankOptimizer):
    """W <- (1 - lr*wd) W - lr [scale back(Adam(R)) + residual_scale sign(G - back(R))].

    Groups without `rank` are plain AdamW. Group keys: `rank`, `update_proj_gap` (200), `scale` (1), `residual_scale` (1; 0.1
    to fine-tune), `moments` ('reset' at a refresh, the step counter too), and those of GaLoreAdamW; `subspace` may be 'random'.

    Args:
        params, lr, betas, eps, nonfinite: as GaLoreAdamW.
        weight_decay: as torch.optim.AdamW.
        inactive_update_rule: 'sign_sgd' | 'sgd', of G - back(R).
        choice: 'basis', or 'columns' of the gradient (rows of a wide one), whose `subspace` is 'uniform', 'top' or 'sample'.
        per_layer: None | 'in_backward': the step needs the whole gradient.

    State of a matrix: that of GaLoreAdamW, or of GrassAdamW for columns.
    """

    choices = {"basis": Orthonormal(), "columns": Rows()}
    inactive_update_rules = {"sign_sgd": True, "sgd": False}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        inactive_update_rule: str = "sign_sgd",
        choice: str = "basis",
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        if inactive_update_rule not in self.inactive_update_rules:
            raise ValueError(
                f"inactive_update_rule must be one of {', '.join(self.inactive_update_rules)}, got {inactive_update_rule!r}"
            )
        if choice not in self.choices:
            raise ValueError(f"choice must be one of {', '.join(self.choices)}, got {choice!r}")
        remainder = StateFree(sign=self.inactive_update_rules[inactive_update_rule])
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        pipeline = Pipeline(Adam(), subspace=self.choices[choice], remainder=remainder)
        super().__init__(params, pipeline, defaults, nonfinite, per_layer)

    def _set_defaults(self, group):
        group.setdefault("moments", "reset")
        if "uniform" in self.pipeline.subspace.selections():
            group.setdefault("subspace", "uniform")
        super()._set_defaults(group)
