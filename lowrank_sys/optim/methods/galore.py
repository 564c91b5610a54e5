"""GaLore (Zhao et al., ICML 2024, arXiv:2403.03507): Adam on the gradient's leading singular directions."""

from lowrank_sys.optim.moments import MIN_8BIT_SIZE, Blocks8bit
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.rules import Adam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate

FINE_TUNED = {"lr": 1e-4, "scale": 4.0, "rank": 256}  # of a trained model: docs/fine-tuning.md


@method("galore", lr=5e-3, plain_lr=3e-3, fine_tuning=FINE_TUNED)
class GaLoreAdamW(LowRankOptimizer):
    """AdamW whose moments live in a rank-r subspace: W <- (1 - lr*wd) W - lr*scale*back(Adam(project(G))).

    Drop-in for torch.optim.AdamW, in its order of decay and eps; groups without `rank` are plain AdamW. Group keys as
    galore_torch's: `rank`, `update_proj_gap` (200), `scale` (0.25), `proj_type` (std | reverse_std | left | right |
    short-moments), and `subspace` (randomized | svd), `moments` (keep | reset | rotate), `seed`, `int8_gemm` (False; True: the
    products of a step in INT8, see docs/kernels/int8-products.md).

    Args:
        params: parameters or groups (lowrank_sys.optim.param_groups makes them from a model).
        lr: rate, float or 0-dim fp32 tensor (a tensor lets torch.compile and CUDA graphs see it change).
        betas, eps, weight_decay: as torch.optim.AdamW.
        nonfinite: 'skip' | 'raise'.
        per_layer: None | 'accumulate' | 'in_backward': frees each matrix's gradient during backward; or an Accumulate or an
            InBackward with their options (docs/per-layer.md).

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` fp32 (r, n) or (m, r), `basis` (m or n, r), `step`, and the schedule.
    """

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        super().__init__(
            params, Pipeline(Adam()), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, nonfinite, per_layer
        )


@method("galore8bit", lr=5e-3, plain_lr=3e-3, fine_tuning=FINE_TUNED)
class GaLoreAdamW8bit(LowRankOptimizer):
    """GaLoreAdamW with moments in 8 bits: codes of the dynamic map of bitsandbytes, in blocks of 256 with an fp32 absmax each.

    Drop-in for galore_torch's GaLoreAdamW8bit and, in groups without `rank`, for bitsandbytes' AdamW8bit; the group keys are
    those of GaLoreAdamW, and `min_8bit_size`: smaller moments (of a low-rank group: of R) stay in fp32, as do those of an R with
    rows of fewer than 64 elements. Blocks begin anew at each row of R. The update comes from the moments before they are rounded.
    lowrank_sys.optim.bitsandbytes converts the state.

    Args:
        params, lr, betas, eps, nonfinite, per_layer: as GaLoreAdamW.
        weight_decay: 0.01 by default, as the peers'.
        min_8bit_size: elements.

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` uint8 (r, n) or (m, r); `exp_avg_absmax`, `exp_avg_sq_absmax` fp32, one a
    block of a row; `basis` (m or n, r), `step`, and the schedule.
    """

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, Pipeline(Adam(), moments=Blocks8bit()), defaults, nonfinite, per_layer)
