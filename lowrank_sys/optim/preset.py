"""Methods by name: a class of parts, and what the command line, the benchmarks and the tests need to know of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lowrank_sys.optim.groups import param_groups
from lowrank_sys.optim.moments import MIN_8BIT_SIZE, Blocks8bit, Fp32
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.remainder import Remainder
from lowrank_sys.optim.rules import Adam
from lowrank_sys.optim.types import NonFinite, Params, PerLayer, Rate
from lowrank_sys.schedule.schedule import Schedule
from lowrank_sys.subspace.orthonormal import Orthonormal

# The rate of fine-tuning over that of pre-training, for methods without one of their own.
FINE_TUNING = 0.15


class Method(NamedTuple):
    """A method of the command line.

    lr, plain_lr: rates that suit its matrices and all other parameters. rank: None without a subspace. scale_key: the group key
    that is the factor of its update, and `scale` its value. keys: more of its low-rank groups. options: arguments of the optimizer;
    int8_options: more of them where weights are INT8. fine_tuning: the fields that are others in `for_fine_tuning`. groups: (model,
    rank, plain=..., target_modules=..., **keys) -> parameter groups. low_rank: whether matrices are trained unlike all else.
    """

    optimizer: type[LowRankOptimizer]
    lr: float
    plain_lr: float
    rank: int | None = 128
    scale_key: str = "scale"
    scale: float = 0.25
    subspace: str = "randomized"
    weights: str = "float"
    update_proj_gap: int = 200
    keys: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    int8_options: Mapping[str, Any] = {}
    fine_tuning: Mapping[str, Any] = {}
    groups: Callable = param_groups
    low_rank: bool = True

    def for_fine_tuning(self) -> "Method":
        """The method with its defaults for a trained model: one rate for all parameters (docs/fine-tuning.md)."""
        found = self._replace(**{"lr": FINE_TUNING * self.lr, **self.fine_tuning})
        return found._replace(plain_lr=found.lr)


METHODS: dict[str, Method] = {}


def method(name, **facts):
    """Decorator: the optimizer class serves method `name`; facts: fields of Method."""

    def register(cls):
        METHODS[name] = Method(cls, **facts)
        return cls

    return register


class Preset(LowRankOptimizer):
    """A method as its parts: class attributes `rule`, `subspace`, `remainder` and `schedule`.

    Args:
        params: parameters or groups (lowrank_sys.optim.param_groups makes them from a model).
        lr: rate, float or 0-dim fp32 tensor.
        weight_decay: decoupled, at the rate lr.
        bits: of the moments: 32, or 8 in blocks of 256.
        nonfinite, per_layer: as GaLoreAdamW.
        **hyper: of the rule, of the plain one and of the schedule (their `defaults`).
    """

    rule = Adam()
    subspace = Orthonormal()
    remainder = Remainder()
    schedule = Schedule()

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
        **hyper,
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {bits!r}")
        moments = Blocks8bit() if bits == 8 else Fp32()
        parts = {"subspace": self.subspace, "remainder": self.remainder, "schedule": self.schedule}
        pipeline = Pipeline(self.rule, moments=moments, **parts)
        known = pipeline.defaults()
        if unknown := sorted(hyper.keys() - known.keys()):
            raise ValueError(f"{type(self).__name__} takes {', '.join(sorted(known))}, got {', '.join(unknown)}")
        defaults = {**known, "lr": lr, "weight_decay": weight_decay, **hyper}
        if bits == 8:
            defaults["min_8bit_size"] = MIN_8BIT_SIZE
        super().__init__(params, pipeline, defaults, nonfinite, per_layer)
