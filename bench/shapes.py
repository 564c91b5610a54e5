"""Shapes, ranks and dtypes as flags spell them, and the matrices of the models."""

import argparse
from typing import NamedTuple

import torch

from lowrank_sys.cli import CommandError
from lowrank_sys.train.models import PRESETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}


class Sizes(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    keys: int  # features of the key and value heads together


# What can be trained, and larger models, whose matrices alone fit.
MODELS = {name: Sizes(p.hidden, p.intermediate, p.layers, p.keys or p.hidden) for name, p in PRESETS.items()} | {
    "llama-30b": Sizes(6656, 17920, 60, 6656),
    "llama-65b": Sizes(8192, 22016, 80, 8192),
    "llama-70b": Sizes(8192, 28672, 80, 1024),  # 8 heads of 128 for keys and values
}


def parse_shape(text):
    """'4096x11008' -> (4096, 11008)."""
    m, _, n = text.partition("x")
    if not (m.isdecimal() and n.isdecimal() and int(m) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not MxN, as in 4096x11008")
    return int(m), int(n)


def positive(text):
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def parse_device(text):
    """'cpu', or 'cuda' where there is a GPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    if text not in devices:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine; valid: {', '.join(devices)}")
    return text


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def matrices(model):
    """Shapes (m, n) of the linear weights of a LLaMA's blocks, layer by layer: q, k, v, o, gate, up, down."""
    s = MODELS[model]
    block = [
        (s.hidden, s.hidden),
        *[(s.keys, s.hidden)] * 2,
        (s.hidden, s.hidden),
        *[(s.intermediate, s.hidden)] * 2,
        (s.hidden, s.intermediate),
    ]
    return block * s.layers


def check_rank(rank, m, n):
    if rank > min(m, n):
        raise CommandError(f"--rank {rank} is too large for shape {m}x{n}: at most {min(m, n)}")
