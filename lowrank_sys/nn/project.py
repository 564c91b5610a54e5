"""project_model and unproject_model: the linear layers of a model to ProjectedLinear and back, in place."""

import logging
from collections.abc import Sequence
from typing import Literal

from torch import nn

from lowrank_sys._ops import FLOATS
from lowrank_sys.nn.coefficient import CONTAINER, give_back, leave_to_us, put_last, restore_order
from lowrank_sys.nn.linear_layers import experts, linear_layers
from lowrank_sys.nn.projected_experts import convert_experts, names_of_stacks, projected_layers, revert_experts, why_not
from lowrank_sys.nn.projected_linear import ProjectedLinear, convert, ours_in_ddp, revert
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.quant_weight import is_quantized
from lowrank_sys.nn.readers import read_by_others
from lowrank_sys.nn.sides import Sides, in_words, sides
from lowrank_sys.subspace.rank import Rank, expect_rank, is_whole, rank_of

logger = logging.getLogger(__name__)

SIDES = ("left", "right", "auto")
# Layers of one module that read the same input, by the names of transformers' models.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def project_model(
    model: nn.Module, rank: Rank = 128, side: Literal["left", "right", "auto"] = "auto", *,
    target_modules: Sequence[str] | None = None, tokens: int = 2048, share: bool = False,
) -> nn.Module:  # fmt: skip
    """Let the linear layers of a model give low-rank gradients in backward, in place (ProjectedLinear); returns the model.

    The layers are those that `lowrank_sys.optim.param_groups` trains in a subspace, as far as they are nn.Linear, transformers'
    Conv1D or QuantLinear, or a subclass that computes as they do, and transformers' experts stacked in one parameter
    (ProjectedExperts). Others (LoRA's, layers whose weight the module around them reads) stay as they are: the same optimizer
    projects their gradients itself. So do frozen ones, and those with a side below the rank; an INT8 weight is then projected at
    the rank it has. A layer keeps its parameters, its hooks and its place.

    Args:
        model: nn.Module with weights in fp32, bf16, fp16 or INT8.
        rank: r, the rank of the optimizer's groups: a number, a share of the shorter side of each weight (between 0 and 1), or a
            function (name, weight) -> number.
        side: where the basis is. 'right': of a weight (out, in) on the input's side, a layer keeps X B (tokens, r) for backward in
            place of X (tokens, in). 'left': it keeps X. 'auto': for each layer the side that costs fewer bytes at `tokens`, of the
            basis, R, its two moments, and what is kept; the sums of both are logged (INFO), compare_sides has each layer's.
        target_modules: substrings of module names; a layer is projected if its name contains one. All by default.
        tokens: in one backward, for 'auto'.
        share: let layers that read the same input (FAMILIES: q, k and v, gate and up) have one basis on its side, chosen from all
            their gradients, and keep one X B together.

    Raises ValueError for what is none of these, and for a weight that several modules share: its gradient is the sum of theirs.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    chosen, stacks = _chosen(model, rank, tokens, target_modules)
    compared = _compared(chosen, stacks, tokens)
    if side == "auto":
        logger.info("project_model at %s tokens, %s", tokens, in_words(compared))
    for (name, layer, own, transposed), both in zip(chosen, compared):
        left = (both.cheaper if side == "auto" else side) == "left"
        convert(layer, own, left, transposed, _family(name) if share and left == transposed else None)
        put_last(model, name)
        leave_to_us(model, ours_in_ddp(name, layer))
    lefts = {both.name: (both.cheaper if side == "auto" else side) == "left" for both in compared}
    for path, module, names in stacks:
        convert_experts(module, {name: (own, lefts[f"{path}.{name}"]) for name, own in names.items()})
        leave_to_us(model, [f"{path}.{name}" for name in names])  # buffers, which would be broadcast at every forward
        for name, layer in projected_layers(module):
            put_last(model, f"{path}.{name}")
            leave_to_us(model, ours_in_ddp(f"{path}.{name}", layer))
    return model


def compare_sides(
    model: nn.Module, rank: Rank = 128, *, tokens: int = 2048, target_modules: Sequence[str] | None = None
) -> list[Sides]:
    """What side='auto' of project_model compares: bytes of the left and of the right side, of each layer that it would project, and
    of each stack of experts, of which an equal share of the tokens is assumed.

    Raises ValueError as project_model does.
    """
    return _compared(*_chosen(model, rank, tokens, target_modules), tokens)


def _compared(chosen, stacks, tokens):
    found = [sides(name, layer.weight, own, tokens, transposed) for name, layer, own, transposed in chosen]
    for path, module, names in stacks:
        for name, own in names.items():
            stack = module._parameters[name]
            count = len(stack)
            of_one = max(1, tokens * getattr(module.config, "num_experts_per_tok", count) // count)
            found.append(sides(f"{path}.{name}", stack[0], own, of_one, False).times(count))
    return found


def unproject_model(model: nn.Module) -> nn.Module:
    """The inverse: layers whose weights get gradients as any do; returns the model. ValueError if it has no ProjectedLinear."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ProjectedLinear)}
    if not layers:
        raise ValueError(f"model has no projected layers, got {type(model).__name__}")
    for name, layer in layers.items():
        give_back(model, ours_in_ddp(name, layer))
    give_back(model, names_of_stacks(model))
    revert_experts(model)
    for layer in [module for module in model.modules() if isinstance(module, ProjectedLinear)]:
        revert(layer)
    restore_order(model)
    return model


def _family(name):
    """What the name of a layer has in common with those that read the same input, None if there are none."""
    parent, _, own = name.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}" for names in FAMILIES if own in names), None)


def _chosen(model, rank, tokens, target_modules):
    """[(name, layer, its rank, whether its weight is (in, out))], and _chosen_experts; ValueError where project_model refuses."""
    rank = expect_rank(rank)
    if not is_whole(tokens):
        raise ValueError(f"tokens must be an integer of at least 1, got {tokens!r}")
    owners, read = {}, read_by_others(model)
    for name, module in model.named_modules():
        for param in module._parameters.values():
            owners.setdefault(id(param), []).append(name)
    found = []
    for name, layer in linear_layers(model, target_modules):
        if isinstance(layer, ProjectedLinear):
            raise ValueError(f"{name} is projected already: call unproject_model first")
        if not _computes_plainly(layer) or layer in read or not layer.weight.requires_grad:
            continue
        weight, full = layer.weight, min(layer.weight.shape)
        if layer is model:
            raise ValueError(f"model must be a module around its linear layers, got {type(model).__name__}")
        _expect_one_owner(f"{name}.weight", owners[id(weight)])
        if weight.dtype not in FLOATS:
            raise ValueError(f"{name}.weight must be float32, bfloat16 or float16, got {weight.dtype}")
        if hasattr(layer, CONTAINER):
            raise ValueError(f"{name} has the low-rank gradients of an optimizer: call its release() first")
        own = rank_of(rank, f"{name}.weight", weight) if full else 1
        if full >= own or (full > 0 and is_quantized(weight)):
            found.append((name, layer, min(own, full), type(layer).__name__ == "Conv1D"))
    stacks = _chosen_experts(model, rank, target_modules, owners)
    if not found and not stacks:
        raise ValueError(f"model has no trainable linear layer to project at rank {rank}, got {type(model).__name__}")
    return found, stacks


def _expect_one_owner(name, owners):
    if len(owners) > 1:
        raise ValueError(f"{name} must be of one module, got {', '.join(owners)}: leave it out by target_modules")


def _chosen_experts(model, rank, target_modules, owners):
    """[(name, module of experts, {name of a stack: its rank})]."""
    found = {}
    for full_name, stack in experts(model, target_modules):
        path, _, name = full_name.rpartition(".")
        own = rank_of(rank, full_name, stack) if min(stack.shape[1:]) else 1
        if not stack.requires_grad or min(stack.shape[1:]) < own:
            continue
        module = model.get_submodule(path)
        _expect_one_owner(full_name, owners[id(stack)])
        if stack.dtype not in FLOATS:
            raise ValueError(f"{full_name} must be float32, bfloat16 or float16, got {stack.dtype}")
        if why := why_not(module, name):
            raise ValueError(f"{full_name} must {why}, got {type(module).__name__}: leave it out by target_modules")
        found.setdefault(path, (path, module, {}))[2][name] = own
    return list(found.values())


def _computes_plainly(layer):
    """Whether y = x W + b is all it does: a subclass, or a forward in place of its own, may do more, and a parametrized weight
    is computed."""
    plain = type(layer).forward in (nn.Linear.forward, QuantLinear.forward) or type(layer).__name__ == "Conv1D"
    return plain and "forward" not in vars(layer) and layer._parameters.get("weight") is not None
