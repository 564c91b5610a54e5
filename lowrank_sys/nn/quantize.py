"""quantize_model and dequantize_model: the linear layers of a model to INT8 or NF4 and back, in place, one at a time."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lowrank_sys.nn.codings import Int8, coding_of, of_method
from lowrank_sys.nn.linear_layers import chosen, linear_layers
from lowrank_sys.nn.projected_linear import ProjectedLinear
from lowrank_sys.nn.quant_experts import QuantExperts, convert_experts, revert_experts, stacks_of
from lowrank_sys.nn.quant_linear import QuantLinear, check_quantizable
from lowrank_sys.nn.readers import read_by_others
from lowrank_sys.nn.skeleton import language_part

# What a Hugging Face configuration says about INT8 weights that quantize_model made.
METHOD = Int8.method

# Subclasses of nn.Linear that compute as it does.
PLAIN = ("FalconLinear",)


class Chosen(NamedTuple):
    """What quantize_model converts: [(name, nn.Linear)], and [(name, module of stacked experts)]."""

    layers: list[tuple[str, nn.Module]]
    experts: list[tuple[str, nn.Module]]


def replaceable_layers(model, target_modules, what):
    """[(name, nn.Linear)] in whose place another layer can be; ValueError where `what` finds none.

    Subclasses of nn.Linear are left alone, for they may use their weight in ways of their own, and so are weights that
    several modules share, those that the module around them reads itself, and in a model of images and text those of images.
    """
    layers = _replaceable(model, target_modules)
    _expect_some(model, [name for name, _ in layers], target_modules, what)
    return layers


def _replaceable(model, target_modules):
    owners, read, of_text = _owners(model), read_by_others(model), language_part(model)
    return [
        (name, module)
        for name, module in linear_layers(model, target_modules)
        if (type(module) is nn.Linear or type(module).__name__ in PLAIN)
        and module is not model
        and len(owners[id(module.weight)]) == 1
        and module not in read
        and module in of_text
    ]


def _owners(model):
    """{id of a parameter: the modules that hold it}."""
    owners = {}
    for module in model.modules():
        for param in module._parameters.values():
            owners.setdefault(id(param), []).append(module)
    return owners


def _expect_some(model, names, target_modules, what):
    for target in target_modules or ():
        if not any(target in name for name in names):
            raise ValueError(f"target_modules: no linear layer to {what} has {target!r} in its name")
    if not names:
        raise ValueError(f"model has no linear layer to {what}, got {type(model).__name__}")


def quantizable(model, target_modules=None, group_size=None, weights="int8"):
    """What quantize_model converts (Chosen): `replaceable_layers`, and stacked experts; ValueError where it would refuse."""
    check_quantizable(torch.float32, group_size, weights)
    layers, owners, of_text, is_chosen = (
        _replaceable(model, target_modules),
        _owners(model),
        language_part(model),
        chosen(target_modules),
    )
    experts = [
        (path, module)
        for path, module in model.named_modules()
        if module in of_text and (names := stacks_of(module)) and module is not model
        if all(is_chosen(f"{path}.{name}") and len(owners[id(module._parameters[name])]) == 1 for name in names)
    ]
    of_experts = [(f"{path}.{name}", module._parameters[name]) for path, module in experts for name in stacks_of(module)]
    found = [*((f"{name}.weight", module.weight) for name, module in layers), *of_experts]
    _expect_some(model, [name for name, _ in found], target_modules, "quantize")
    for name, weight in found:
        check_quantizable(weight.dtype, group_size, weights, name)
    return Chosen(layers, experts)


def quantize_model(
    model: nn.Module, *, weights: str = "int8", target_modules: Sequence[str] | None = None, group_size: int | None = None
) -> nn.Module:
    """Keep the weights of the model's linear layers in INT8 or NF4, in place; returns the model.

    The layers are those that `lowrank_sys.optim.param_groups` trains in a subspace, as far as they are nn.Linear: embeddings,
    output heads and tied weights stay. Experts that are stacked in one parameter become a QuantLinear each (QuantExperts) in
    modules that transformers' use_experts_implementation knows; others stay, and a warning says so. Values are rounded to the
    nearest code. One layer at a time: at most one layer's float weight exists beside the quantized ones, unless something else (an
    optimizer) still holds the old parameters. Hooks on the replaced modules are not carried over.

    Args:
        model: nn.Module with weights in fp32, bf16 or fp16.
        weights: 'int8', or 'nf4' (Dettmers et al. 2023), of which LoQT trains a low-rank part and nothing else trains any.
        target_modules: substrings of module names; a layer is replaced if its name contains one. All by default.
        group_size: neighbours of a row that share a scale; a power of two from 32 to 1024. None: 256, in NF4 64.
    """
    layers, experts = quantizable(model, target_modules, group_size, weights)
    found = places(model)
    while layers:
        _, linear = layers.pop()
        quantized = QuantLinear.from_linear(linear, group_size, weights)
        replace(found, linear, quantized)
    for _, module in experts:
        convert_experts(module, group_size, weights)
    tell_of_stacks(model)
    mark(model, group_size, weights)
    return model


def tell_of_stacks(model):
    """Warn of matrices that are stacked in one parameter, as experts are: they stay float, and may be most of the model."""
    of_text = {id(p) for module in language_part(model) for p in module._parameters.values()}
    stacks = [(name, p) for name, p in model.named_parameters() if p.dim() > 2 and min(p.shape) > 1 and id(p) in of_text]
    if stacks:
        name, p = max(stacks, key=lambda pair: pair[1].numel())
        share = sum(p.numel() for _, p in stacks) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{len(stacks)} parameters of several matrices each stay in {p.dtype}, {share:.0%} of all weights, such as {name} of "
            f"shape {tuple(p.shape)}",
            stacklevel=3,
        )


def dequantize_model(model: nn.Module) -> nn.Module:
    """The inverse: nn.Linear with the quantized weights' values in their compute dtype, in place, one at a time; returns the model.

    What save_pretrained then writes is an ordinary checkpoint. ValueError if the model has no quantized
    weights.
    """
    kinds = [type(module) for module in model.modules() if isinstance(module, QuantLinear)]
    if any(issubclass(kind, ProjectedLinear) for kind in kinds):
        raise ValueError("model has projected layers: call unproject_model first")
    if not kinds:
        raise ValueError(f"model has no quantized weights, got {type(model).__name__}")
    for module in [module for module in model.modules() if isinstance(module, QuantExperts)]:
        revert_experts(module)
    found = places(model)
    layers = [module for module in found if isinstance(module, QuantLinear)]
    while layers:
        quantized = layers.pop()
        replace(found, quantized, plain_linear(quantized, quantized.dequantized(), quantized.weight.requires_grad))
    if is_marked(getattr(model, "config", None)):
        del model.config.quantization_config
    return model


def plain_linear(layer, weight, trains):
    """nn.Linear with this weight (out, in), in the place of a layer that holds it otherwise."""
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight, linear.bias = nn.Parameter(weight, trains), layer.bias
    return linear.train(layer.training)


def places(model):
    """module -> its (parent, name)s: a module may be at several."""
    found = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            found.setdefault(child, []).append((parent, name))
    return found


def replace(found, old, new):
    for parent, name in found.pop(old):
        setattr(parent, name, new)


def mark(model, group_size, weights):
    """Tell the model's configuration, if it has one, so that a saved model says what it is."""
    if hasattr(model, "config"):
        coding = coding_of(weights)
        size = coding.group_size if group_size is None else group_size
        model.config.quantization_config = {"quant_method": coding.method, "group_size": size}


def marked(config):
    """The coding of the weights that a configuration speaks of, or None."""
    quantization = getattr(config, "quantization_config", None)
    return of_method(quantization.get("quant_method")) if isinstance(quantization, dict) else None


def is_marked(config):
    return marked(config) is not None
