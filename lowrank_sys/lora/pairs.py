"""The pairs of factors of a model: those of peft's LoRA layers, known by peft's names, and those of factored layers."""

from typing import NamedTuple

from torch import nn

from lowrank_sys.nn.factored import FactoredLinear


class Pair(NamedTuple):
    """Two factors of a weight (m, n), of which scale B A is a part.

    name: of the module that holds them, as peft's base model calls it. A (r, n), B (m, r).
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float


def pairs(model: nn.Module, adapter: str | None = None) -> list[Pair]:
    """Every pair of the model, of peft's `adapter` or of all. Of convolutions and embeddings there is none.

    Raises ValueError where there is no pair, and for an adapter whose weight is another function of its factors, such as DoRA's.
    """
    found = [pair for name, module in model.named_modules() for pair in _pairs_of(base_name(name), module, adapter)]
    if not found:
        wanted = "" if adapter is None else f" of adapter {adapter!r}"
        raise ValueError(f"model has no pair of factors{wanted}, got {type(model).__name__}")
    return found


def _pairs_of(name, module, adapter):
    if isinstance(module, FactoredLinear):
        return [Pair(name, module.A, module.B, module.scale)] if adapter is None else []
    found = []
    for key, layer in module.lora_A.items() if is_lora(module) else ():
        if adapter not in (None, key) or layer.weight.dim() != 2:
            continue
        if variant := getattr(module, "lora_variant", {}).get(key):
            raise ValueError(f"{name} must be of weight W + scale B A, got {type(variant).__name__} in adapter {key!r}")
        found.append(Pair(name, layer.weight, module.lora_B[key].weight, float(module.scaling[key])))
    return found


def is_lora(module):
    """Whether it is a LoRA layer of peft."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "scaling")


def base_name(name):
    """A module's name without what peft puts before it."""
    return name.removeprefix("base_model.model.")
