"""How transformers reads checkpoints whose tensors are not the model's: experts one by one, names of older releases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Piece(NamedTuple):
    """Tensors of a checkpoint, by name, and what makes tensors of the model of them: a function of how a tensor is read."""

    names: list[str]
    make: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]


def pieces(model: PreTrainedModel, names: Iterable[str], known: set[str]) -> list[Piece]:
    """What a checkpoint with these tensors holds, piece by piece, in the order of `names`; `known`: names of the model's tensors.

    By the table of transformers itself, which from_pretrained goes by.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    place = (model.base_model_prefix, dict.fromkeys(known, True))
    found, together = {}, {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, *place)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            target, pattern = name, None  # whoever puts it there says so
        if pattern is None:
            found[name] = Piece([name], lambda read, name=name, target=target: {target: read(name)})
        else:
            together.setdefault(target, []).append((name, pattern))
    for target, sources in together.items():
        converter = copy.deepcopy(of_pattern[sources[0][1]])
        found[sources[0][0]] = Piece([name for name, _ in sources], _converted(model, converter, target, sources))
    order = {name: i for i, name in enumerate(names)}
    return sorted(found.values(), key=lambda piece: order[piece.names[0]])


def _converted(model, converter, target, sources):
    def make(read):
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern, lambda name=name: read(name))
        made = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return make
