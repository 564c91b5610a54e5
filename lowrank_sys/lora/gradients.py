"""full_gradients: the gradients of the weights of linear layers, without a gradient on any of them."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lowrank_sys.lora.pairs import base_name, is_lora
from lowrank_sys.nn.linear_layers import linear_layers


def full_gradients(
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], torch.Tensor], *,
    target_modules: Sequence[str] | None = None, device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """{name of a linear layer: mean over the batches of the gradient of its weight, (out, in) in fp32}.

    Each is dYᵀ X of a layer's outputs and inputs: a frozen weight has one too, and so has one in 4 or 8 bits. No parameter gets a
    gradient, for none requires one meanwhile. A layer that no batch reaches is left out.

    Args:
        model: as it is before peft, or with LoRA layers, whose base layers are then meant.
        batches: what loss_of takes, one after the other.
        loss_of: (model, batch) -> loss, a 0-dim tensor.
        target_modules: substrings of names of layers, where the model has no LoRA layers; all linear layers by default.
        device: where the sums are kept, each as large as its weight in fp32; that of the layer by default.
    """
    layers = [(base_name(name), module) for name, module in model.named_modules() if is_lora(module)]
    layers = layers or linear_layers(model, target_modules)
    if not layers:
        raise ValueError(f"model has no linear layer of target_modules, got {type(model).__name__}")
    sums, count = {}, 0
    with _frozen(model), contextlib.ExitStack() as hooks:
        for name, layer in layers:
            hooks.callback(layer.register_forward_hook(_keep(sums, name, device)).remove)
        for batch in batches:
            with torch.enable_grad():
                loss_of(model, batch).backward()
            count += 1
    if not sums:
        raise ValueError(f"batches must reach a linear layer, got {count} of them")
    return {name: total.div_(count) for name, total in sums.items()}


@contextlib.contextmanager
def _frozen(model):
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _keep(sums, name, device):
    """A hook that adds the gradient of a layer's weight to the sums, once its output has one."""

    def hook(layer, args, output):
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # the first of a frozen model; a copy, which others may write into
            output = output.detach().requires_grad_().clone()
        x = args[0].detach()

        def add(dy):
            gradient = dy.reshape(-1, dy.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
            gradient = gradient if device is None else gradient.to(device)
            sums[name] = gradient if name not in sums else sums[name].add_(gradient)

        output.register_hook(add)
        return output

    return hook
