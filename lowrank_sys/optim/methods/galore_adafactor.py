"""GaLore (Zhao et al., ICML 2024, arXiv:2403.03507) around Adafactor (Shazeer and Stern 2018)."""

from lowrank_sys.optim import hyper
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.rules import Adafactor
from lowrank_sys.optim.types import NonFinite, Params, PerLayer, Rate


# The rates of the command line are plain ones: neither relative to the step count nor to the size of a weight.
@method("galore-adafactor", lr=5e-3, plain_lr=3e-3, options={"relative_step": False, "scale_parameter": False})
class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor whose statistics live in a rank-r subspace; groups without `rank` are plain Adafactor.

    Arguments and defaults as galore_torch's GaLoreAdafactor. With `relative_step` the rate follows the step count and `lr`
    must be None. The update is clipped and scaled in the subspace, then projected back.

    State of a matrix: `row` (rows of R, 1), `col` (1, columns of R), `basis`, `step`, the schedule; `exp_avg` with beta1.
    """

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
        hyper.check(defaults, {**hyper.RULES, **Adafactor.checks})
        if relative_step == (lr is not None):
            raise ValueError(f"lr must be {'None with' if relative_step else 'given without'} relative_step, got {lr}")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init needs relative_step, got relative_step=False")
        super().__init__(params, Pipeline(Adafactor()), defaults, nonfinite, per_layer)
