"""Configurations of others: special tokens that the vocabulary does not have, vocabularies too small for bytes, parts of models."""

import pytest
import torch
from lanes import usual
from transformers import GPT2Config, LlamaConfig, Phi3Config, ViTConfig

from lowrank_sys.cli import CommandError, main
from lowrank_sys.train import models

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def saved(tmp_path, config):
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model" / "config.json")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, vocab_size=300, pad_token_id=300, bos_token_id=1, eos_token_id=[2, 400]),
        LlamaConfig(**SMALL, vocab_size=300, pad_token_id=-1, bos_token_id=128000, eos_token_id=128001),
        Phi3Config(**SMALL, vocab_size=300),
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300),
    ],
    ids=["pad and one end", "negative", "phi3", "gpt2"],
)
def test_foreign_special_tokens_are_forgotten(tmp_path, config):
    read = models.config(saved(tmp_path, config))
    ids = {key: value for key, value in vars(read).items() if key.endswith("_token_id") and value is not None}
    assert all(isinstance(value, int) and 0 <= value < 300 for value in ids.values())
    assert ids.get("bos_token_id") == (1 if config.bos_token_id == 1 else None)
    logits = models.build(read, dtype=torch.float32, device=torch.device("cpu"))(torch.tensor([[0, 299]])).logits
    assert logits.isfinite().all()


def test_a_vocabulary_that_a_tokenizer_makes_smaller(tmp_path):
    read = models.config(saved(tmp_path, LlamaConfig(**SMALL, vocab_size=300, pad_token_id=250)), vocab=20)
    assert read.vocab_size == 20 and read.pad_token_id is None


@pytest.mark.parametrize("command", usual(["train"], "plan"))
def test_bytes_need_256_tokens(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, LlamaConfig(**SMALL, vocab_size=255))
    flags = ["--out", "out"] if command == "train" else ["--device-memory", "24GiB"]
    assert main([command, "--model", path, "--rank", "8", "--steps", "2", "--seq-len", "16", *flags]) == 2
    said = capsys.readouterr().err
    assert "vocab_size must be at least 256" in said and "got 255" in said and "Traceback" not in said


def test_a_tokenizer_may_be_smaller_than_bytes(tmp_path):
    assert models.config(saved(tmp_path, LlamaConfig(**SMALL, vocab_size=255)), vocab=30).vocab_size == 30


def test_a_model_of_images_is_no_language_model(tmp_path):
    with pytest.raises(CommandError, match="ViTConfig has no vocab_size"):
        models.config(saved(tmp_path, ViTConfig()))
