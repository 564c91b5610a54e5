"""The defaults of --from, which are those of fine-tuning."""

import argparse

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_sys.optim.preset import FINE_TUNING
from lowrank_sys.train import flags, trainer
from lowrank_sys.train.methods import METHODS, settle


def settled(*words):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(list(words))
    flags.check(args)
    return settle(args)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder whose configuration can be read: a name would be asked for on the network."""
    LlamaConfig().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("method, lr, rank, scale", [
    ("galore", 1e-4, 256, 4.0), ("q-galore", 1e-4, 256, 4.0), ("apollo", 3e-4, 256, 1.0),
    ("apollo-mini", FINE_TUNING * 2e-3, 1, 128.0), ("fira", FINE_TUNING * METHODS["fira"].lr, 128, METHODS["fira"].scale),
])  # fmt: skip
def test_of_a_checkpoint_all_trains_at_one_rate(method, lr, rank, scale, checkpoint):
    args = settled("--from", checkpoint, "--method", method)
    assert (args.lr, args.plain_lr, args.rank, args.scale, args.seq_len) == (lr, lr, rank, scale, 512)
    args = settled("--from", checkpoint, "--method", method, "--lr", "0.5", "--rank", "3")
    assert (args.lr, args.plain_lr, args.rank) == (0.5, 0.5, 3)
    assert settled("--from", checkpoint, "--lr", "0.5", "--plain-lr", "0.25").plain_lr == 0.25


def test_of_a_model_that_is_drawn_nothing_changes():
    args = settled("--method", "galore", "--lr", "0.5")
    assert (args.plain_lr, args.rank, args.scale, args.seq_len) == (METHODS["galore"].plain_lr, 128, 0.25, 128)


def test_the_help_names_them():
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    assert "galore 0.0001 with --scale 4 --rank 256" in " ".join(parser.format_help().split())


def test_float_weights_are_merged_by_a_cast(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    trainer.save_final(model, tmp_path / "final", None, merged=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").dtype == torch.bfloat16
