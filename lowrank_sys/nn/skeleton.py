"""Hugging Face models on the meta device, and their parts made real one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config`, all on the meta device: it has shapes and takes no memory."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype)


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that makes the language model of `config`: with the part for images, where its family has one."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    both = _has_text_part(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if both else AutoModelForCausalLM


def _has_text_part(config):
    return "text_config" in getattr(config, "sub_configs", ())


def language_part(model: nn.Module) -> set[nn.Module]:
    """The modules that text passes through: of a model of images and text its decoder and its head, of any other all."""
    if not _has_text_part(getattr(model, "config", None)):
        return set(model.modules())
    return {*model.get_decoder().modules(), model.get_output_embeddings()} - {None}


class Builder:
    """Makes the parts of a skeleton real on `device`; weights that modules share stay shared."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self._device = device
        self._meta = [*model.parameters(), *model.buffers()]  # alive, so that an id stays one's own
        self._made: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def allocate(self, module: nn.Module) -> None:
        """Give the module's own parameters and buffers memory, with no values yet."""
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    made = self._made.get(id(tensor))
                    if made is None:
                        made = torch.empty_like(tensor, device=self._device)
                        if tensors is module._parameters:
                            made = nn.Parameter(made, tensor.requires_grad)
                        self._made[id(tensor)] = made
                    tensors[name] = made


def visit(model: PreTrainedModel, act: Callable[[PreTrainedModel, nn.Module], None]) -> None:
    """act(owner, module) for every module, children first, as transformers initialises; owner's rule is the module's."""
    _visit(model, model, act, set())


def _visit(owner, module, act, seen):
    from transformers import PreTrainedModel

    if module in seen:
        return
    seen.add(module)
    if isinstance(module, PreTrainedModel):
        owner = module
    for child in list(module.children()):
        _visit(owner, child, act, seen)
    act(owner, module)
