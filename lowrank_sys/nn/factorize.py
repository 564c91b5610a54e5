"""factorize_model and merge_factors: the linear layers of a model to low-rank plus sparse ones and back, in place."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from lowrank_sys._ops import FLOATS
from lowrank_sys.nn.channel_sparse import ChannelSparseLinear
from lowrank_sys.nn.factored import FactoredLinear, check_share
from lowrank_sys.nn.quantize import places, plain_linear, replace, replaceable_layers
from lowrank_sys.nn.sparse_low_rank import SparseLowRankLinear

FORMS = ("entries", "channels")


def factorize_model(
    model: nn.Module, rank: int = 128, form: Literal["entries", "channels"] = "entries", *, density: float = 0.03,
    alpha: float = 32.0, gamma: float = 0.5, target_modules: Sequence[str] | None = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Make the weights of the model's linear layers low-rank plus sparse, in place; returns the model.

    The layers are those that `lowrank_sys.optim.param_groups` trains in a subspace, as far as they are nn.Linear with both sides of
    at least the rank. Biases stay the parameters that they are; hooks on the replaced modules are not carried over.

    Args:
        model: nn.Module with weights in fp32, bf16 or fp16.
        rank: r of the factors.
        form: 'entries', W = alpha/rank B A + S with S on a random support (SLTrain), drawn anew: for training from scratch.
            'channels', W = gamma B A + (1 - gamma) S with S whole columns (LOST), from the singular vectors of the weight.
        density: the share of W that S has, of its elements or of its columns.
        alpha, gamma: of the forms, see SparseLowRankLinear and ChannelSparseLinear.
        target_modules: substrings of module names; a layer is replaced if its name contains one. All by default.
        seed: of the supports, the same on every process.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    check_share("density", density)
    check_share("gamma", gamma)
    layers = replaceable_layers(model, target_modules, "factorize")
    layers = [(name, layer) for name, layer in layers if min(layer.weight.shape) >= rank]
    if not layers:
        raise ValueError(f"model has no linear layer to factorize at rank {rank}, got {type(model).__name__}")
    for name, layer in layers:
        if layer.weight.dtype not in FLOATS:
            raise ValueError(f"{name}.weight must be float32, bfloat16 or float16, got {layer.weight.dtype}")
    found, generator = places(model), torch.Generator().manual_seed(seed)
    for _, linear in layers:
        replace(found, linear, _factored(linear, rank, form, density, alpha, gamma, generator))
    return model


def _factored(linear, rank, form, density, alpha, gamma, generator):
    weight = linear.weight
    sizes = (linear.in_features, linear.out_features, rank, False)
    if form == "entries":
        place = {"device": weight.device, "dtype": weight.dtype}
        made = SparseLowRankLinear(*sizes, **place, density=density, alpha=alpha, generator=generator)
    else:
        made = ChannelSparseLinear(*sizes, "meta", weight.dtype, density=density, gamma=gamma).to_empty(device=weight.device)
        made.take_apart_(weight)
    for param in (made.B, made.A, made.values):
        param.requires_grad_(weight.requires_grad)
    made.bias = linear.bias
    return made.train(linear.training)


def merge_factors(model: nn.Module) -> nn.Module:
    """The inverse: nn.Linear with the values of scale B A + S, in place, one at a time; returns the model.

    What save_pretrained then writes is an ordinary checkpoint. ValueError if the model has no such layers.
    """
    found = places(model)
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    if not layers:
        raise ValueError(f"model has no factored layers, got {type(model).__name__}")
    while layers:
        factored = layers.pop()
        replace(found, factored, plain_linear(factored, factored.dense(), factored.A.requires_grad))
    return model
