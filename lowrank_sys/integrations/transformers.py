"""Trainer of transformers.

    import lowrank_sys.integrations.transformers

makes the names of TrainingArguments(optim=...) that stand for galore_torch's and apollo_torch's optimizers (NAMES) stand for those
of this package, neither of which has to be installed. `optim_target_modules` and `optim_args` are read as transformers reads them.
Every other method is reached by `optimizer`. Raises ImportError where Trainer has no table of optimizers to put them into.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import __version__, trainer
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from lowrank_sys.integrations.building import optimizer, value
from lowrank_sys.optim import Accumulate, APOLLOAdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, InBackward, LowRankOptimizer
from lowrank_sys.optim.groups import param_groups

# Private to transformers, and the one that Trainer itself reads.
_HANDLERS = getattr(trainer, "_OPTIMIZER_HANDLERS", None)
if _HANDLERS is None:
    raise ImportError(
        f"transformers {__version__} has no table transformers.trainer._OPTIMIZER_HANDLERS, so its names cannot stand for this "
        "package's optimizers; Trainer(optimizer_cls_and_kwargs=...) takes lowrank_sys.integrations.building.optimizer(METHOD)"
    )

__all__ = ["NAMES", "optimizer"]

_GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
_APOLLO = {**_GALORE, "scale": 1.0, "proj": "random", "scale_type": "channel"}
# The names of transformers: class, transformers' defaults of the low-rank group, and options of the class.
NAMES: Mapping[str, tuple[type[LowRankOptimizer], dict[str, Any], dict[str, Any]]] = {
    "galore_adamw": (GaLoreAdamW, _GALORE, {}),
    "galore_adamw_8bit": (GaLoreAdamW8bit, _GALORE, {}),
    "galore_adafactor": (GaLoreAdafactor, _GALORE, {"relative_step": False, "scale_parameter": False}),
    "apollo_adamw": (APOLLOAdamW, _APOLLO, {}),
}
LAYERWISE = "_layerwise"


def _serve(context):
    """A handler of transformers: what it makes its optimizer from."""
    args, name = context.args, OptimizerNames(context.args.optim).value
    layerwise = name.endswith(LAYERWISE)
    cls, defaults, options = NAMES[name.removesuffix(LAYERWISE)]
    if args.optim_target_modules is None:
        raise ValueError(f"optim_target_modules must be given with optim={name!r}: names of modules, a pattern, or 'all-linear'")
    keys = {**defaults, **{key: value(text) for key, text in context.optim_args.items()}}
    options = {**options, "lr": args.learning_rate, "weight_decay": args.weight_decay}
    if cls is not GaLoreAdafactor:
        options |= context.adam_kwargs
    if layerwise:
        options["per_layer"] = _per_layer(cls, args)

    def handler(model: nn.Module, **options: Any) -> LowRankOptimizer:
        return cls(param_groups(model, target_modules=_targets(args.optim_target_modules), **keys), **options)

    return lambda: handler, options


def _per_layer(cls, args):
    if cls is not APOLLOAdamW:
        return Accumulate()
    if args.gradient_accumulation_steps == 1:
        return InBackward(max_norm=args.max_grad_norm or None)
    warnings.warn(
        f"optim='apollo_adamw{LAYERWISE}' keeps gradients whole with gradient_accumulation_steps="
        f"{args.gradient_accumulation_steps}: APOLLO scales the whole gradient, which no projection of its parts gives",
        stacklevel=2,
    )
    return None


def _targets(modules):
    """optim_target_modules as param_groups takes them; None for all linear layers."""
    if isinstance(modules, str) and modules.replace("_", "-") == "all-linear":
        return None
    return lambda name: bool(check_target_module_exists(modules, name))


for _name in NAMES:
    for _full in (_name, _name + LAYERWISE):
        _HANDLERS[OptimizerNames(_full)] = _serve
