"""A LLaMA small enough for a laptop, and bytes of the Python library to train it on."""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=128))


def batches(count, size=4, length=64, seed=0):
    """`count` batches of token ids (size, length)."""
    data = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        first = torch.randint(len(data) - length, (size,), generator=generator)
        yield torch.stack([data[i : i + length] for i in first])


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss
