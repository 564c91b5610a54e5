"""Training methods of the command line: those of lowrank_sys.optim by name, and the plain optimizers beside them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING

from lowrank_sys import optim
from lowrank_sys.cli import CommandError
from lowrank_sys.optim.preset import METHODS as LOW_RANK
from lowrank_sys.optim.preset import Method
from lowrank_sys.train import models

if TYPE_CHECKING:
    import argparse

    import torch

# Flags whose default is the method's, besides the rates.
DEFAULTS = ("rank", "scale", "subspace", "weights", "update_proj_gap")


def _plain_groups(model, rank=None, *, plain=None, target_modules=None, **keys):
    """The same split as the low-rank methods', so that embeddings, norms and head have their own rate, and no rank."""
    rounding = {"stochastic_rounding": True, "seed": keys["seed"]} if keys.get("stochastic_rounding") else {}
    others, linear = optim.param_groups(model, rank=1, plain=plain, target_modules=target_modules, **rounding)
    return [others, {"params": linear["params"], **rounding}]


METHODS = {
    "adamw": Method(optim.GaLoreAdamW, lr=3e-4, plain_lr=1e-2, groups=_plain_groups, low_rank=False),
    "adamw8bit": Method(optim.GaLoreAdamW8bit, lr=3e-4, plain_lr=1e-2, groups=_plain_groups, low_rank=False),
    **dict(sorted(LOW_RANK.items())),
}

# Those that are known to need little memory: what `lowrank plan` tries where a run does not fit.
LEAN = ("galore8bit", "q-galore", "apollo-mini")


def method_of(args: argparse.Namespace) -> Method:
    """The method of `args`, with the defaults of fine-tuning where it trains a checkpoint."""
    method = METHODS[args.method]
    return method if args.from_ is None else method.for_fine_tuning()


def settle(args: argparse.Namespace, tell: Callable[[str], None] = lambda line: None) -> argparse.Namespace:
    """`args` with what was left to the method filled in.

    Weights that a method keeps quantized unless it is told otherwise stay float in a model that has none to keep so; tell: called
    with a line then.
    """
    method = method_of(args)
    missing = {name: getattr(method, name) for name in DEFAULTS if getattr(args, name) is None}
    if missing.get("weights", "float") != "float" and not models.has_quantizable_layers(args.model):
        missing["weights"] = "float"
        tell(f"weights: stay float with --method {args.method}: {args.model} has no plain nn.Linear to quantize")
    return type(args)(**{**vars(args), **missing})


def _groups(method, model, args):
    keys = {"seed": args.seed, **method.keys}
    if args.stochastic_rounding:
        keys["stochastic_rounding"] = True
    if args.rank is not None:
        keys |= {"update_proj_gap": args.update_proj_gap, "subspace": args.subspace, method.scale_key: args.scale}
        if args.projected is None:
            keys["proj_type"] = args.proj_type
        if args.int8_gemm:  # the optimizer refuses it where it cannot
            keys["int8_gemm"] = True
    return method.groups(model, rank=args.rank, target_modules=args.target_modules, plain={"lr": args.plain_lr}, **keys)


def _per_layer(args):
    import torch

    if args.per_layer == "in_backward":  # it clips by itself: nothing is left to clip for the trainer
        return optim.InBackward(max_norm=args.grad_clip or None)
    if args.per_layer == "accumulate":
        return optim.Accumulate(torch.bfloat16 if args.accumulate_dtype == "bf16" else torch.float32)
    return None


def _option(text: str) -> tuple[str, object]:
    """(name, value) of NAME=VALUE: a value as Python has it, else the text itself."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise CommandError(f"--option: got {text!r}; it must be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def project(model: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    """`model` with the layers that --projected asks for, in place. Raises CommandError with the words of project_model."""
    if args.projected is None:
        return model
    from lowrank_sys.nn import project_model

    rank, tokens = settle(args).rank, args.batch_size * args.seq_len
    if rank is None:
        raise CommandError(f"--projected needs a --rank, which --method {args.method} has none of by itself")
    try:
        return project_model(model, rank, args.projected, target_modules=args.target_modules, tokens=tokens)
    except ValueError as error:
        raise CommandError(f"--projected {args.projected}: {error}") from error


def build(model: torch.nn.Module, args: argparse.Namespace) -> optim.LowRankOptimizer:
    """The optimizer of `args.method` over the parameters of `model`; its second group is the linear weights.

    Raises CommandError with the optimizer's own words, as for a rank above min(m, n) of a weight.
    """
    method, args = method_of(args), settle(args)
    own = dict(map(_option, args.option or ()))
    options = {**method.options, **(method.int8_options if args.weights == "int8" else {}), **own}
    if taken := sorted(own.keys() & {"params", "lr", "weight_decay", "per_layer"}):
        raise CommandError(f"--option: {', '.join(taken)} must be given by the flags of that name")
    try:
        groups = _groups(method, model, args)
        return method.optimizer(groups, lr=args.lr, weight_decay=args.weight_decay, per_layer=_per_layer(args), **options)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except TypeError as error:
        if own:
            raise CommandError(f"--option: {error}") from error
        raise
