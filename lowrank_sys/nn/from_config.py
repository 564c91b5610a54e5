"""quantized_from_config: a freshly initialised model whose float weights never exist together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lowrank_sys.nn.quant_experts import convert_experts
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.quantize import mark, places, quantizable, replace, tell_of_stacks
from lowrank_sys.nn.skeleton import Builder, skeleton, visit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@torch.no_grad()
def quantized_from_config(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    *,
    target_modules: Sequence[str] | None = None,
    group_size: int | None = None,
    weights: str = "int8",
) -> PreTrainedModel:
    """A freshly initialised causal language model with INT8 or NF4 weights, as quantize_model makes them.

    Layer by layer the weights are drawn by the model's own rule, quantized and dropped: the peak is the quantized model and the
    float weight of one layer (all experts of one), and of those that the rule of a module around them draws again.

    dtype: of what stays float, and of the computation. seed: of the draws; None: torch's global generator.
    target_modules, group_size, weights: as of quantize_model. Raises ValueError as quantize_model.
    """
    model = skeleton(config, dtype)
    layers, experts = quantizable(model, target_modules, group_size, weights)
    chosen, stacked = _last_writers(model, [module for _, module in layers]), {module for _, module in experts}
    found, builder = places(model), Builder(model, torch.device(device))

    def make(owner, module):
        builder.allocate(module)
        owner._init_weights(module)
        for linear in chosen.get(module, ()):
            replace(found, linear, QuantLinear.from_linear(linear, group_size, weights))
            linear.weight = None  # whoever still holds the module
        if module in stacked:
            convert_experts(module, group_size, weights)

    with _seeded(seed):
        visit(model, make)
    model.tie_weights()
    tell_of_stacks(model)
    mark(model, group_size, weights)
    return model


def _last_writers(model, layers):
    """module -> those of `layers` whose weight its initialisation is the last to write: itself, or a module around it.

    Tried on the skeleton, whose tensors count how often they were written.
    """
    last = {linear: linear for linear in layers}

    def write(owner, module):
        inside = [child for child in module.modules() if child in last and child is not module]
        before = [child.weight._version for child in inside]
        if inside:
            owner._init_weights(module)
        last.update((child, module) for child, version in zip(inside, before) if child.weight._version != version)

    visit(model, write)
    by_writer = {}
    for linear, module in last.items():
        by_writer.setdefault(module, []).append(linear)
    return by_writer


@contextlib.contextmanager
def _seeded(seed):
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
