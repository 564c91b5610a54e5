"""GaLore (Zhao et al., ICML 2024, arXiv:2403.03507): Adam or Adafactor on the gradient's leading singular directions."""

from lowrank_sys.optim import hyper
from lowrank_sys.optim.moments import MIN_8BIT_SIZE, Blocks8bit
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.rules import Adafactor, Adam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate


@method("galore", lr=5e-3, plain_lr=3e-3)
class GaLoreAdamW(LowRankOptimizer):
    """AdamW whose moments live in a rank-r subspace: W <- (1 - lr*wd) W - lr*scale*back(Adam(project(G))).

    Drop-in for torch.optim.AdamW; groups without `rank` are plain AdamW. Group keys as galore_torch's: `rank`,
    `update_proj_gap` (200), `scale` (0.25), `proj_type` (std | reverse_std | left | right | short-moments), and `subspace`
    (randomized | svd), `moments` (keep | reset | rotate), `seed`, `int8_gemm` (False; True: the products of a step in INT8, see
    docs/kernels/int8-products.md). The order is torch.optim.AdamW's, where galore_torch decays after the update and adds eps
    before bias correction.

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


@method("galore8bit", lr=5e-3, plain_lr=3e-3)
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


# The rates of the command line are plain ones: neither relative to the step count nor to the size of a weight.
@method("galore-adafactor", lr=5e-3, plain_lr=3e-3, options={"relative_step": False, "scale_parameter": False})
class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor whose statistics live in a rank-r subspace; groups without `rank` are plain Adafactor.

    Arguments and defaults as galore_torch's GaLoreAdafactor. With `relative_step` the rate follows the step count and `lr`
    must be None. The update is clipped and scaled in the subspace, then projected back.

    State of a matrix: `row` (rows of R, 1), `col` (1, columns of R), `basis`, `step`, the schedule; `exp_avg` with beta1.
    """

    rules = {
        **hyper.RULES,
        "lr": hyper.optional(hyper.rate),
        "eps": hyper.pair("eps", hyper.at_least(0)),
        "clip_threshold": hyper.number("a number above 0", lambda value: value > 0),
        "decay_rate": hyper.number("a number", lambda value: True),
        "beta1": hyper.optional(hyper.momentum),
        "scale_parameter": hyper.flag,
        "relative_step": hyper.flag,
        "warmup_init": hyper.flag,
    }

    def __init__(
        self,
        params: Params,
        lr: Rate | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        hyper.check(defaults, self.rules)
        if relative_step == (lr is not None):
            raise ValueError(f"lr must be {'None with' if relative_step else 'given without'} relative_step, got {lr}")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init needs relative_step, got relative_step=False")
        super().__init__(params, Pipeline(Adafactor()), defaults, nonfinite, per_layer)
