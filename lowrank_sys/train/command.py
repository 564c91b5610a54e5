"""`lowrank train`: flags, checks, and the order of things."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TrainError
from .methods import METHODS
from .models import PRESETS

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")

# flags that a resumed run may change: they alter neither the weights so far nor what an optimizer state means
FREE = {"out", "resume", "steps", "save_steps", "eval_steps", "eval_tokens", "keep", "device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lowrank train`; imports nothing heavy."""
    parser.description = (
        "Pre-train a LLaMA. DIR gets metrics.jsonl (a row a step), summary.json, loss.png, checkpoints step-* and the "
        "final weights in final/, which from_pretrained reads. Losses are nats a token."
    )
    add = parser.add_argument
    add("--model", metavar="NAME", default="llama-9m", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    add("--method", metavar="NAME", default="galore", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    add(
        "--data",
        metavar="PATH_OR_NAME",
        default="python-stdlib",
        help="a file, a folder, a glob (text; rows of .jsonl, .ndjson, .parquet; .gz of text and JSON lines), "
        "name:SPLIT or name:CONFIG:SPLIT of a Hugging Face data set, or python-stdlib, the Python library's own "
        "sources (default); held in memory",
    )
    add("--text-field", metavar="NAME", default="text", help="the column of rows that holds the text (default: text)")
    add("--tokenizer", metavar="NAME", help="a Hugging Face tokenizer, its size is the vocabulary (default: bytes)")
    add("--steps", metavar="N", type=int, default=220, help="optimizer steps (default: %(default)s)")
    add("--batch-size", metavar="B", type=int, default=4, help="sequences a micro-batch (default: %(default)s)")
    add("--seq-len", metavar="T", type=int, default=128, help="tokens a sequence (default: %(default)s)")
    add(
        "--gradient-accumulation-steps",
        metavar="N",
        type=int,
        default=1,
        help="micro-batches a step (default: %(default)s)",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward to save memory")
    add("--rank", metavar="R", type=int, default=128, help="rank of the low-rank gradients (default: %(default)s)")
    add("--update-proj-gap", metavar="N", type=int, default=200, help="steps between refreshes of a basis (default: 200)")
    add("--scale", type=float, default=0.25, help="factor on the low-rank update (default: %(default)s)")
    add("--proj-type", metavar="NAME", default="std", help="which side is projected (default: %(default)s)")
    add("--subspace", metavar="NAME", default="randomized", help="how a basis is found (default: %(default)s)")
    rates = ", ".join(f"{name} {m.lr:g} and {m.plain_lr:g}" for name, m in METHODS.items())
    add("--lr", type=float, help=f"learning rate of the linear weights (default: the method's; with --plain-lr: {rates})")
    add("--plain-lr", metavar="LR", type=float, help="learning rate of embeddings, norms and head")
    add("--weight-decay", metavar="WD", type=float, default=0.0, help="decoupled decay (default: %(default)s)")
    add("--grad-clip", metavar="NORM", type=float, default=1.0, help="largest gradient norm, 0 for none (default: 1)")
    add("--warmup-ratio", metavar="X", type=float, default=0.1, help="share of the steps that warm up (default: 0.1)")
    add("--warmup-steps", metavar="N", type=int, help="steps that warm up, in place of --warmup-ratio")
    add("--min-lr-ratio", metavar="X", type=float, default=0.1, help="where the cosine ends (default: %(default)s)")
    add("--seed", metavar="S", type=int, default=0, help="of weights, data order and bases (default: %(default)s)")
    add("--dtype", metavar="NAME", default="auto", help="weights: fp32 or bf16 (default: bf16 on a GPU, fp32 on a CPU)")
    add("--device", metavar="NAME", default="auto", help="cpu or cuda (default: cuda where there is a GPU)")
    add("--eval-steps", metavar="N", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    add("--eval-tokens", metavar="N", type=int, default=16384, help="validation tokens used (default: %(default)s)")
    add("--save-steps", metavar="N", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    add("--keep", metavar="N", type=int, default=2, help="checkpoints kept (default: %(default)s)")
    add("--out", metavar="DIR", help="where the files go (default: runs/MODEL-METHOD); must not hold a run already")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest intact checkpoint in DIR, exactly as if never stopped; start anew if there is none. "
        "The other flags must be as before, except --steps (a new --steps moves the end of the schedule), --save-steps, "
        "--eval-steps, --eval-tokens, --keep and --device",
    )


def run(args: argparse.Namespace) -> int:
    """Train. Returns the exit code: 0, 2 for bad input, 1 for a failure while writing, 130 when interrupted."""
    try:
        _check(args)
        _train(args)
        return 0
    except TrainError as error:
        print(f"lowrank train: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"lowrank train: interrupted; --resume goes on from the last checkpoint in {args.out}", file=sys.stderr)
        return 130


def _check(args: argparse.Namespace) -> None:
    """Fill the defaults that depend on other flags; raise TrainError for the first bad value."""
    for flag, valid in (("model", PRESETS), ("method", METHODS), ("dtype", DTYPES), ("device", DEVICES)):
        if getattr(args, flag) not in valid:
            raise TrainError(f"--{flag}: unknown {getattr(args, flag)!r}; valid: {', '.join(valid)}")
    method = METHODS[args.method]
    args.lr = method.lr if args.lr is None else args.lr
    args.plain_lr = method.plain_lr if args.plain_lr is None else args.plain_lr
    args.warmup_steps = round(args.warmup_ratio * args.steps) if args.warmup_steps is None else args.warmup_steps
    args.out = args.out or f"runs/{args.model}-{args.method}"

    at_least = {
        **dict.fromkeys(("steps", "batch_size", "gradient_accumulation_steps", "rank", "update_proj_gap"), 1),
        **dict.fromkeys(("eval_steps", "eval_tokens", "save_steps", "keep"), 1),
        **dict.fromkeys(("lr", "plain_lr", "scale", "weight_decay", "grad_clip", "min_lr_ratio"), 0),
        **dict.fromkeys(("warmup_ratio", "warmup_steps", "seed"), 0),
        "seq_len": 2,
    }
    for name, least in at_least.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= least):
            raise TrainError(f"--{name.replace('_', '-')}: got {value}; it must be at least {least}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: lowrank train runs as one process on one device")


def _train(args: argparse.Namespace) -> None:
    import torch
    import transformers

    from . import data, methods, models, report, trainer
    from .record import Recorder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, dtype = _device(args), None
    args.dtype = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(args.dtype, args.dtype)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]

    out = Path(args.out)
    corpus = data.load(args.data, seq_len=args.seq_len, tokenizer=args.tokenizer, field=args.text_field)
    _say(
        f"data: {args.data}, {corpus.documents:,} documents; {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.valid):,} for validation, split by {corpus.split}"
    )
    identity = {name: value for name, value in sorted(vars(args).items()) if name not in FREE and _plain(value)}
    identity["data_sha256"] = corpus.digest()
    with _Claim(out):
        resumed = _start(args, out, identity)
        valid = data.sample(corpus.valid, args.seq_len, args.eval_tokens)
        train_sample = data.sample(corpus.train, args.seq_len, args.eval_tokens)

        transformers.set_seed(args.seed)
        preset_vocab = corpus.vocab if args.tokenizer else None
        model = models.build(
            models.config(args.model, vocab=preset_vocab, seq_len=args.seq_len), dtype=dtype, device=device
        )
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable()
        optimizer = methods.build(model, args)
