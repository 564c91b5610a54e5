"""Models: presets (llama-1m and llama-9m for a laptop, llama3-8b as Meta's LLaMA 3.1 8B, the rest as in the GaLore paper),
configurations, and checkpoints."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowrank_sys.cli import CommandError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


class Preset(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    keys: int | None = None  # features of the key and value heads together; None: hidden
    more: dict[str, Any] = {}  # of LlamaConfig, as its config.json has it


LLAMA_31 = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
PRESETS = {
    "llama-1m": Preset(192, 512, 2, 6, 256),
    "llama-9m": Preset(512, 1376, 3, 8, 256),
    "llama-60m": Preset(512, 1376, 8, 8, 32000),
    "llama-130m": Preset(768, 2048, 12, 12, 32000),
    "llama-350m": Preset(1024, 2736, 24, 16, 32000),
    "llama-1b": Preset(2048, 5461, 24, 32, 32000),
    "llama-7b": Preset(4096, 11008, 32, 32, 32000),
    "llama-13b": Preset(5120, 13824, 40, 40, 32000),
    "llama3-8b": Preset(4096, 14336, 32, 32, 128256, keys=1024, more=LLAMA_31),
}


# Tokens where there is no tokenizer.
BYTES = 256


def is_known(name: str) -> bool:
    """Whether `name` is a preset, or a configuration file that is there."""
    return name in PRESETS or name.endswith(".json") and Path(name).is_file()


def config(name: str, *, vocab: int | None = None, seq_len: int = 1024) -> LlamaConfig:
    """Configuration of the preset `name`, with untied embedding and head; or of a Hugging Face config file or checkpoint, also of a
    model of images and text.

    vocab: size of the vocabulary in tokens; None, where tokens are bytes, for the preset's or the file's own.
    seq_len: longest sequence in tokens.
    Raises CommandError for what is no configuration of a language model.
    """
    from transformers import AutoConfig, LlamaConfig

    from lowrank_sys.train.encoders import where

    if name not in PRESETS:
        place, options = where(name)
        try:
            read = AutoConfig.from_pretrained(place, **options)
        except Exception as error:  # no JSON, no model_type, an unknown one: a type of its own each
            raise CommandError(f"--model {name}: transformers cannot read it: {error}") from error
        text = read.get_text_config()
        if not isinstance(getattr(text, "vocab_size", None), int):
            raise CommandError(f"--model {name}: {type(read).__name__} has no vocab_size: it is no language model by itself")
        if vocab is None and name.endswith(".json") and text.vocab_size < BYTES:  # a checkpoint has a tokenizer
            raise CommandError(
                f"--model {name}: its vocab_size must be at least {BYTES}, the values of a byte, without --tokenizer, "
                f"got {text.vocab_size}"
            )
        text.vocab_size = vocab or text.vocab_size
        use_cache(read, False)
        _forget_quantization(read)
        for part in {id(part): part for part in (read, text)}.values():
            _forget_foreign_tokens(part, text.vocab_size)
        return read
    p = PRESETS[name]
    return LlamaConfig(**{
        "hidden_size": p.hidden,
        "intermediate_size": p.intermediate,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.heads,
        "vocab_size": vocab or p.vocab,
        "max_position_embeddings": max(1024, seq_len),
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **copy.deepcopy(p.more),  # transformers writes into what it gets
    })  # fmt: skip


def use_cache(config, value: bool) -> None:
    """Whether the language model keeps keys and values: for those who generate."""
    for part in (config, config.get_text_config()):
        part.use_cache = value


def _forget_quantization(config) -> None:
    """The weights are drawn afresh, so what a repository says of its own quantized ones is true of none; also of parts."""
    for key in ("quantization_config", "compression_config"):
        vars(config).pop(key, None)
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _forget_quantization(getattr(config, name))


def _forget_foreign_tokens(config, vocabulary: int) -> None:
    """Ids of special tokens that this vocabulary does not have: they are another tokenizer's, and embeddings refuse them."""
    for key in [key for key in vars(config) if key.endswith("_token_id")]:
        ids = getattr(config, key)
        if ids is not None and not all(0 <= i < vocabulary for i in (ids if isinstance(ids, list) else [ids])):
            setattr(config, key, None)


def has_quantizable_layers(name: str) -> bool:
    """Whether the model `name` has linear layers that quantize_model replaces; True for what is no model at all."""
    return name in PRESETS or _has_quantizable_layers(name, Path(name).stat().st_mtime_ns if Path(name).exists() else 0)


@functools.lru_cache
def _has_quantizable_layers(path: str, changed: int) -> bool:
    import torch

    from lowrank_sys.nn.quantize import quantizable
    from lowrank_sys.nn.skeleton import skeleton

    try:
        model = skeleton(config(path), torch.float32)
    except Exception:  # `config` and `build` say what is wrong with it
        return True
    try:
        return any(quantizable(model))
    except ValueError:
        return False


def build(
    config: LlamaConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights: str = "float",
    target_modules: list[str] | None = None,
) -> LlamaForCausalLM:
    """A freshly initialised model, drawn from torch's global generator directly in `dtype` on `device`.

    weights: 'float', or 'int8' or 'nf4' (lowrank_sys.nn), of which at most one layer's float weight exists at a time; of the
    linear layers whose name contains one of target_modules, or of all. Raises CommandError where there is none.
    """
    import torch

    from lowrank_sys.nn.skeleton import auto_class

    if weights != "float":
        from lowrank_sys.nn import quantized_from_config

        try:
            return _for_text(quantized_from_config(config, dtype, device, target_modules=target_modules, weights=weights))
        except ValueError as error:
            raise CommandError(str(error)) from error
    # from_config rather than .to(dtype): the rotary frequencies stay fp32
    with torch.device(device):
        return _for_text(auto_class(config).from_config(config, dtype=dtype))


def not_of_text(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The weights that text does not pass through: those of a model's part for images."""
    from lowrank_sys.nn.skeleton import language_part

    of_text = {id(p) for module in language_part(model) for p in module._parameters.values()}
    return [p for p in model.parameters() if id(p) not in of_text]


def _for_text(model: PreTrainedModel) -> PreTrainedModel:
    for param in not_of_text(model):
        param.requires_grad_(False)
    return model


def load(
    name: str, *, dtype: torch.dtype, device: torch.device, weights: str = "float", target_modules: list[str] | None = None
) -> PreTrainedModel:
    """The causal language model of a checkpoint: a folder, a name on the Hugging Face hub, or a GGUF file.

    weights: as of `build`: quantized, of safetensors one weight at a time, so that the float model never exists; of others it
    does. Weights that are quantized there stay so. Raises CommandError.
    """
    from transformers import AutoConfig

    from lowrank_sys.nn import quantize_model, quantized_from_pretrained
    from lowrank_sys.nn.skeleton import auto_class
    from lowrank_sys.train.encoders import where

    place, options = where(name)
    try:
        if not options and not Path(place).is_dir():
            from huggingface_hub import snapshot_download

            place = snapshot_download(place, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        safe = not options and any(Path(place).glob("*.safetensors"))
        if safe and (weights != "float" or any(Path(place).glob("manifest.json"))):
            coding = "int8" if weights == "float" else weights  # of a folder with a manifest, which says its own
            model = quantized_from_pretrained(place, dtype, device, target_modules=target_modules, weights=coding)
        else:
            family = auto_class(AutoConfig.from_pretrained(place, **options))
            model = family.from_pretrained(place, dtype=dtype, **options).to(device)
            _forget_quantization(model.config)
            for key in ("is_quantized", "hf_quantizer", "quantization_method"):  # of a GGUF file: its values are plain now
                vars(model).pop(key, None)
            if weights != "float":
                model = quantize_model(model, target_modules=target_modules, weights=weights)
    except Exception as error:  # of transformers, safetensors, gguf and the hub: a type of its own each
        raise CommandError(f"--from {name}: cannot load it: {' '.join(str(error).split())[:500]}") from error
    use_cache(model.config, False)
    return _for_text(model)
