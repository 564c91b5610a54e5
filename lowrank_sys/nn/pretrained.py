"""Models with INT8 or NF4 weights on the disk: from any Hugging Face checkpoint, tensor by tensor, and to one of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank_sys.nn import manifest
from lowrank_sys.nn.conversions import pieces
from lowrank_sys.nn.low_rank_part import NAMES, check_part
from lowrank_sys.nn.quant_experts import LAYERS, QuantExperts, convert_experts
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.quantize import mark, marked, places, quantizable, replace, tell_of_stacks
from lowrank_sys.nn.skeleton import Builder, skeleton, visit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What older checkpoints have and models compute by themselves.
COMPUTED = "rotary_emb.inv_freq"


def save_quantized(model: PreTrainedModel, folder: str | Path, **options: Any) -> None:
    """save_pretrained, with size and SHA-256 of every file in a manifest that quantized_from_pretrained checks.

    Quantized weights are written as `codes` and `scale`, and their low-rank part if they have one, beside the other tensors, all
    by the names that the model gives them, and are read back exactly. Plain transformers cannot read them: dequantize_model first
    where it should. options: of save_pretrained, such as max_shard_size.
    """
    model.save_pretrained(folder, **{"save_original_format": False, **options})
    manifest.sign(Path(folder))


@torch.no_grad()
def quantized_from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    target_modules: Sequence[str] | None = None,
    group_size: int | None = None,
    weights: str = "int8",
) -> PreTrainedModel:
    """A causal language model with INT8 or NF4 weights from the checkpoint in `folder` (config.json and safetensors).

    Weight by weight, it is read as transformers reads it, quantized from the values as they are stored, and dropped: the peak is
    the quantized model and its largest float weight, all experts of a stack together. A checkpoint with such weights
    (`save_quantized`, or save_pretrained of a quantized model) is read back exactly; target_modules, group_size and weights are
    then its own.

    Args:
        folder: path. A manifest in it (`save_quantized`, checkpoints of `lowrank train`) is checked first.
        dtype: of what stays float, and of the computation; None: as the checkpoint's configuration says, else fp32.
        target_modules, group_size, weights: as of quantize_model.

    Raises ValueError that names the file or the tensor: missing, damaged, unknown, of another shape.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    if (folder / manifest.MANIFEST).is_file():
        try:
            manifest.verify(folder)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    config = AutoConfig.from_pretrained(folder)
    other = getattr(config, "quantization_config", None)
    if other is not None and marked(config) is None:
        raise ValueError(f"{folder}: the weights must be float, or INT8 or NF4 of lowrank_sys, got quantization_config {other}")
    files = _files(folder)
    coded = {name.removesuffix(".codes") for name in files if name.endswith(".codes")}
    if coded and marked(config) is None:
        raise ValueError(f"{folder}: config.json has no quantization_config for quantized weights such as {min(coded)}.codes")
    if coded:
        group_size, weights = config.quantization_config.get("group_size"), marked(config).name
        if group_size is None:
            raise ValueError(f"{folder}: quantization_config: group_size must be a power of two from 32 to 1024, got None")

    model = skeleton(config, dtype or config.dtype or torch.float32)
    layers, experts = quantizable(model, None if coded else target_modules, group_size, weights)
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
    read, found = pieces(model, files, known), places(model)
    for name, linear in layers:
        if not coded or name in coded:
            replace(found, linear, QuantLinear.from_linear(linear, group_size, weights))
    for name, module in experts:
        if not coded or any(layer.startswith(f"{name}.{LAYERS}.") for layer in coded):
            convert_experts(module, group_size, weights)
    tell_of_stacks(model)
    _make_computed(model, torch.device(device))
    for piece in read:
        _put_all(model, piece.make(lambda name: _read(files[name], name)), torch.device(device))
    model.tie_weights()
    missing = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of the model, the first {missing[0]}")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            try:
                check_part(module._buffers, tuple(module.weight.shape))
            except ValueError as error:
                raise ValueError(f"{folder}: {name}: {error}") from None
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    mark(model, group_size, weights)
    return model.eval()


def _files(folder: Path) -> dict[str, Path]:
    """name of a tensor -> its file."""
    if (folder / INDEX).is_file():
        try:
            files = {name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{folder / INDEX} is damaged") from None
        missing = sorted({path.name for path in files.values() if not path.is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
        return dict(sorted(files.items(), key=lambda item: item[1]))
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}")
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read(path: Path, name: str) -> torch.Tensor:
    """The tensor, mapped from its file."""
    from safetensors import SafetensorError

    # opened anew for every tensor: pages of an open file stay in the process
    with _opened(path) as file:
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None


def _make_computed(model: PreTrainedModel, device: torch.device) -> None:
    """Make what no checkpoint has: buffers that the model computes when it is initialised."""
    builder = Builder(model, device)

    def make(owner, module):
        if module._non_persistent_buffers_set:
            builder.allocate(module)
            owner._init_weights(module)

    visit(model, make)


def _put_all(model: PreTrainedModel, made: dict[str, torch.Tensor], device: torch.device) -> None:
    for name in list(made):
        _put(model, name, made.pop(name), device)  # no name of it stays while the next one is read


def _put(model: PreTrainedModel, name: str, value: torch.Tensor, device: torch.device) -> None:
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    stacked = isinstance(module, QuantExperts) and key in module.quant_experts
    if stacked or isinstance(module, QuantLinear) and key == "weight":
        try:
            module.quantize_(key, value.to(device)) if stacked else module.quantize_(value.to(device))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from None
        return
    if isinstance(module, QuantLinear) and key in NAMES:
        module._buffers[key] = value.to(device, copy=True)
        return
    tensors = next((t for t in (module._parameters, module._buffers) if t.get(key) is not None), None) if module else None
    if tensors is None:
        if name.endswith(COMPUTED):
            return
        raise ValueError(f"the model has no {name}, which the checkpoint has")
    old = tensors[key]
    if value.shape != old.shape:
        raise ValueError(f"{name} must have shape {tuple(old.shape)}, got {tuple(value.shape)}")
    cast = tensors is module._parameters and old.dtype.is_floating_point and value.dtype.is_floating_point
    if old.dtype != value.dtype and not cast:
        raise ValueError(f"{name} must be {old.dtype}, got {value.dtype}")
    value = value.to(device, old.dtype, copy=True)
    tensors[key] = nn.Parameter(value, old.requires_grad) if tensors is module._parameters else value
    if isinstance(module, QuantLinear):
        module.follow()
