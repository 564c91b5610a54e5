"""The flags of `lowrank train` and what they may be."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from lowrank_sys.cli import CommandError
from lowrank_sys.train import launcher
from lowrank_sys.train.methods import METHODS, method_of
from lowrank_sys.train.models import PRESETS, is_known

MODEL = "llama-9m"
DTYPES = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("float", "int8", "nf4")
PER_LAYER = ("accumulate", "in_backward")
PROJECTED = ("left", "right", "auto")
ACCUMULATE_DTYPES = ("fp32", "bf16")

# Flags that a resumed run must have in common with its checkpoint, and flags that it may change: those alter neither the
# weights so far nor the meaning of an optimizer state.
BOUND = (
    "model",
    "from_",
    "method",
    "data",
    "valid_data",
    "no_packing",
    "text_field",
    "tokenizer",
    "batch_size",
    "seq_len",
    "gradient_accumulation_steps",
    "rank",
    "update_proj_gap",
    "scale",
    "proj_type",
    "subspace",
    "lr",
    "plain_lr",
    "weight_decay",
    "grad_clip",
    "warmup_ratio",
    "warmup_steps",
    "min_lr_ratio",
    "seed",
    "dtype",
    "weights",
    "per_layer",
    "accumulate_dtype",
    "int8_gemm",
    "stochastic_rounding",
    "target_modules",
    "option",
    "projected",
)
# Bound flags that older checkpoints do not have, and what they were.
NEWER = {
    "int8_gemm": False, "stochastic_rounding": False, "target_modules": None, "from_": None, "valid_data": None,
    "no_packing": False, "option": None, "projected": None,
}  # fmt: skip
SEQ_LEN, FINE_TUNING_SEQ_LEN = 128, 512
MERGE_DTYPES = ("fp32", "bf16", "fp16")
REPORTERS = ("tensorboard", "wandb")
FREE = (
    "out",
    "resume",
    "steps",
    "save_steps",
    "eval_steps",
    "eval_tokens",
    "keep",
    "gradient_checkpointing",
    "device",
    "as_given",
    "merge_dtype",
    "report_to",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lowrank train`; imports nothing heavy."""
    parser.description = (
        "Pre-train a model, or fine-tune a checkpoint (--from). DIR gets metrics.jsonl (a row a step), summary.json, loss.png, "
        "checkpoints step-* and the final weights in final/, which from_pretrained reads. Losses are nats a token."
    )
    add = parser.add_argument
    models = f"one of {', '.join(PRESETS)}, or the path of a Hugging Face config.json"
    add("--model", metavar="NAME", default=MODEL, help=f"{models} (default: %(default)s)")
    add(
        "--from",
        dest="from_",
        metavar="CHECKPOINT",
        help="fine-tune this, in place of --model: a folder as save_pretrained writes it, a name on the Hugging Face hub, or a "
        "GGUF file. Its tokenizer is taken, and windows hold whole documents that do not see each other; of rows of messages "
        "(OpenAI), conversations (ShareGPT), or prompt and completion the answers alone are learned. "
        f"One rate for all parameters (default: {_fine_tuning()})",
    )
    add("--method", metavar="NAME", default="galore", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    add(
        "--data",
        metavar="PATH_OR_NAME",
        default="python-stdlib",
        help="a file, a folder, a glob (text; rows of JSON lines, JSON, CSV, Parquet, Arrow; packed as .gz, .zst, .xz, .bz2), "
        "name:SPLIT or name:CONFIG:SPLIT of a Hugging Face data set, or python-stdlib, the Python library's own "
        "sources (default); what takes long to turn into tokens is kept under ~/.cache/lowrank-sys",
    )
    add("--valid-data", metavar="PATH_OR_NAME", help="all of the validation, in place of a part of --data (with --from)")
    add("--no-packing", action="store_true", help="one document a window (with --from)")
    add("--text-field", metavar="NAME", default="text", help="the column of rows that holds the text (default: text)")
    add("--tokenizer", metavar="NAME", help="a Hugging Face tokenizer, its size is the vocabulary (default: bytes)")
    add("--steps", metavar="N", type=int, default=220, help="optimizer steps (default: %(default)s)")
    add("--batch-size", metavar="B", type=int, default=4, help="sequences a micro-batch (default: %(default)s)")
    add("--seq-len", metavar="T", type=int, help=f"tokens a sequence (default: {SEQ_LEN}; with --from {FINE_TUNING_SEQ_LEN})")
    add("--gradient-accumulation-steps", metavar="N", type=int, default=1, help="micro-batches a step (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward to save memory")
    add(
        "--per-layer",
        metavar="MODE",
        help="free each matrix's gradient during backward: accumulate (its projection adds up over the micro-batches) or "
        "in_backward (its step is taken at once; one micro-batch a step, clipped by the previous step's norm)",
    )
    add(
        "--projected",
        metavar="SIDE",
        help="let backward make the projections of gradients, and no gradient of a matrix: layers of project_model, with the basis "
        "on the side left, right (less is kept for backward), or auto, for each layer the one that takes fewer bytes",
    )
    add(
        "--accumulate-dtype",
        metavar="NAME",
        default="fp32",
        help="of what --per-layer accumulate adds up: fp32, or bf16, rounded once a micro-batch (default: %(default)s)",
    )
    add(
        "--as-given",
        action="store_true",
        help="keep --per-layer and --gradient-checkpointing as given: without this, quantized weights that would not fit otherwise "
        "take what was not given by themselves",
    )
    add(
        "--rank",
        metavar="R",
        type=_rank,
        help=f"rank of the low-rank gradients, or below 1 its share of the shorter side (default: {_defaults('rank')})",
    )
    add(
        "--target-modules",
        metavar="NAME",
        nargs="+",
        help="parts of the names of the linear layers that are low-rank, and quantized with --weights int8 or nf4 (default: all)",
    )
    add(
        "--update-proj-gap",
        metavar="N",
        type=int,
        help=f"steps between refreshes of a basis (default: {_defaults('update_proj_gap')})",
    )
    add("--scale", type=float, help=f"factor on the low-rank update (default: {_defaults('scale')})")
    add("--proj-type", metavar="NAME", default="std", help="which side is projected (default: %(default)s)")
    add("--subspace", metavar="NAME", help=f"how a basis is found, or rows are selected (default: {_defaults('subspace')})")
    add(
        "--option",
        metavar="NAME=VALUE",
        nargs="+",
        help="arguments of the method's optimizer by their names in Python, as active_layers=2 period=20 (--method lisa) or "
        "momentum=0.9 (--method muon)",
    )
    add(
        "--int8-gemm",
        action="store_true",
        help="products with the basis in INT8, quantised on the fly: faster, and about 1%% off (--method galore)",
    )
    rates = ", ".join(f"{name} {m.lr:g} and {m.plain_lr:g}" for name, m in METHODS.items())
    add("--lr", type=float, help=f"learning rate of the linear weights (default: the method's; with --plain-lr: {rates})")
    add("--plain-lr", metavar="LR", type=float, help="learning rate of embeddings, norms and head")
    add("--weight-decay", metavar="WD", type=float, default=0.0, help="decoupled decay (default: %(default)s)")
    add("--grad-clip", metavar="NORM", type=float, default=1.0, help="largest gradient norm, 0 for none (default: 1)")
    add("--warmup-ratio", metavar="X", type=float, default=0.1, help="share of the steps that warm up (default: 0.1)")
    add("--warmup-steps", metavar="N", type=int, help="steps that warm up, in place of --warmup-ratio")
    add("--min-lr-ratio", metavar="X", type=float, default=0.1, help="where the cosine ends (default: %(default)s)")
    add("--seed", metavar="S", type=int, default=0, help="of weights, data order and bases (default: %(default)s)")
    dtypes = "of computation and float weights: fp32 or bf16 (default: bf16 on a GPU, fp32 on a CPU)"
    add("--dtype", metavar="NAME", default="auto", help=dtypes)
    add(
        "--stochastic-rounding",
        action="store_true",
        help="with --dtype bf16: round float weights stochastically at every step, so that updates and decay below half of a "
        "weight's last place count in the mean",
    )
    add(
        "--weights",
        metavar="NAME",
        help="of the linear layers: float, in --dtype, or int8, rounded stochastically at every step, or nf4 with --method loqt; "
        f"of quantized ones the loss is computed without its logits (default: {_defaults('weights')})",
    )
    add(
        "--merge-dtype",
        metavar="NAME",
        help="write quantized weights to final/ as an ordinary checkpoint, which plain transformers reads, in one of "
        f"{', '.join(MERGE_DTYPES)}",
    )
    add("--device", metavar="NAME", default="auto", help="cpu or cuda (default: cuda where there is a GPU)")
    add("--eval-steps", metavar="N", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    add("--eval-tokens", metavar="N", type=int, default=16384, help="validation tokens used, 0 for none (default: %(default)s)")
    add("--save-steps", metavar="N", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    add("--keep", metavar="N", type=int, default=2, help="checkpoints kept (default: %(default)s)")
    add(
        "--report-to",
        metavar="NAME",
        nargs="+",
        help=f"hand what metrics.jsonl gets to these as well, as Trainer does: {', '.join(REPORTERS)} (tensorboard in DIR/runs)",
    )
    add("--out", metavar="DIR", help="where the files go (default: runs/MODEL-METHOD); must not hold a run already")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest intact checkpoint in DIR, exactly as if never stopped; start anew if there is none yet. "
        "The other flags must be as before, except those that change nothing so far: "
        + ", ".join(flag(name) for name in FREE[2:])
        + ". A new --steps moves the end of the schedule",
    )


def _rank(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _defaults(name: str) -> str:
    """The methods' defaults of a flag: the most common one, then whose are others."""
    usual = getattr(METHODS["galore"], name)
    others = {key: getattr(m, name) for key, m in METHODS.items() if getattr(m, name) != usual}
    return ", ".join(
        [str(usual), *(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in others.items())]
    )


def _fine_tuning() -> str:
    """The methods' rates for --from, and whatever else is another there."""
    found = []
    for name, method in METHODS.items():
        more = [f"{flag(key)} {value:g}" for key, value in method.fine_tuning.items() if key != "lr"]
        found.append(" ".join([f"{name} {method.for_fine_tuning().lr:g}", *(["with", *more] if more else [])]))
    return ", ".join(found)


def _title(model: str) -> str:
    """The name of a model in those of files: of a config.json, its folder's."""
    path = Path(model).resolve()
    return model if model in PRESETS else path.parent.name if path.stem == "config" else path.stem


def flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"


def words(args: argparse.Namespace) -> list[str]:
    """The command line that gives these flags, but for --resume."""
    found = []
    for name in (*BOUND, *FREE):
        value = getattr(args, name)
        if name == "resume" or value is None or value is False:
            continue
        found += [flag(name)] if value is True else [flag(name), *value] if isinstance(value, list) else [f"{flag(name)}={value}"]
    return found


def check(args: argparse.Namespace) -> launcher.Place:
    """Fill the defaults that depend on other flags; raise CommandError for the first bad value. Returns the place among the
    processes of a launcher."""
    if args.from_ is not None:
        if args.model not in (MODEL, args.from_):
            raise CommandError(f"--model {args.model}: --from {args.from_} is the model")
        args.model, args.tokenizer = args.from_, args.tokenizer or args.from_
    elif args.valid_data is not None or args.no_packing:
        raise CommandError(f"{'--no-packing' if args.no_packing else '--valid-data'} needs --from")
    elif not is_known(args.model):
        raise CommandError(f"--model: unknown {args.model!r}; valid: {', '.join(PRESETS)}, or a config.json")
    if args.seq_len is None:
        args.seq_len = SEQ_LEN if args.from_ is None else FINE_TUNING_SEQ_LEN
    for name, valid in {
        "method": METHODS,
        "dtype": DTYPES,
        "device": DEVICES,
        "weights": (None, *WEIGHTS),
        "per_layer": (None, *PER_LAYER),
        "projected": (None, *PROJECTED),
        "accumulate_dtype": ACCUMULATE_DTYPES,
        "merge_dtype": (None, *MERGE_DTYPES),
    }.items():
        if getattr(args, name) not in valid:
            raise CommandError(f"{flag(name)}: unknown {getattr(args, name)!r}; valid: {', '.join(filter(None, valid))}")
    if unknown := [name for name in args.report_to or () if name not in REPORTERS]:
        raise CommandError(f"--report-to: unknown {unknown[0]!r}; valid: {', '.join(REPORTERS)}")
    if args.accumulate_dtype != "fp32" and args.per_layer != "accumulate":
        raise CommandError(f"--accumulate-dtype {args.accumulate_dtype} needs --per-layer accumulate")
    if args.per_layer == "in_backward" and args.gradient_accumulation_steps > 1:
        raise CommandError(
            f"--per-layer in_backward takes a step every micro-batch, got --gradient-accumulation-steps "
            f"{args.gradient_accumulation_steps}; use --per-layer accumulate"
        )
    if args.per_layer and not METHODS[args.method].low_rank:
        raise CommandError(f"--per-layer needs a method with low-rank gradients, got --method {args.method}")
    if args.projected and not METHODS[args.method].low_rank:
        raise CommandError(f"--projected needs a method with low-rank gradients, got --method {args.method}")
    if args.projected and args.proj_type != "std":
        raise CommandError(f"--proj-type {args.proj_type}: --projected {args.projected} says which side")
    if args.weights == "nf4" and METHODS[args.method].weights != "nf4":
        able = ", ".join(name for name, method in METHODS.items() if method.weights == "nf4")
        raise CommandError(f"--weights nf4 needs --method {able}, which trains a part beside them, got --method {args.method}")
    if args.int8_gemm and not METHODS[args.method].low_rank:
        raise CommandError(f"--int8-gemm needs a method with low-rank gradients, got --method {args.method}")
    method = method_of(args)
    if args.from_ is not None and args.plain_lr is None:
        args.plain_lr = args.lr
    args.lr = method.lr if args.lr is None else args.lr
    args.plain_lr = method.plain_lr if args.plain_lr is None else args.plain_lr
    args.out = args.out or f"runs/{_title(args.model)}-{args.method}"

    if args.rank is not None and not (0 < args.rank < 1 or isinstance(args.rank, int) and args.rank >= 1):
        raise CommandError(f"--rank: got {args.rank}; it must be an integer of at least 1, or a number in (0, 1)")
    at_least = {
        **dict.fromkeys(("steps", "batch_size", "gradient_accumulation_steps", "update_proj_gap"), 1),
        **dict.fromkeys(("eval_steps", "save_steps", "keep"), 1),
        **dict.fromkeys(("lr", "plain_lr", "scale", "weight_decay", "grad_clip", "min_lr_ratio", "eval_tokens"), 0),
        **dict.fromkeys(("warmup_ratio", "warmup_steps", "seed"), 0),
        "seq_len": 2,
    }
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise CommandError(f"{flag(name)}: got {value}; it must be at least {least}")
    return launcher.leave(os.environ)
