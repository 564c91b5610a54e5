"""Training methods: a name, its optimizer, and the learning rates that suit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lowrank_sys.cli import CommandError
from lowrank_sys.train import models

if TYPE_CHECKING:
    import argparse

    import torch

    from lowrank_sys.optim import LowRankOptimizer


class Method(NamedTuple):
    build: Callable[[torch.nn.Module, argparse.Namespace], LowRankOptimizer]
    lr: float
    plain_lr: float
    low_rank: bool = True  # whether gradients are projected
    rank: int = 128
    scale: float = 0.25
    subspace: str = "randomized"
    weights: str = "float"


# Flags whose default is the method's, besides the rates.
DEFAULTS = ("rank", "scale", "subspace", "weights")


def settle(args: argparse.Namespace, tell: Callable[[str], None] = lambda line: None) -> argparse.Namespace:
    """`args` with what was left to the method filled in.

    Weights that a method keeps in INT8 unless it is told otherwise stay float in a model that has none to keep so; tell: called
    with a line then.
    """
    method = METHODS[args.method]
    missing = {name: getattr(method, name) for name in DEFAULTS if getattr(args, name) is None}
    if missing.get("weights") == "int8" and not models.has_int8_layers(args.model):
        missing["weights"] = "float"
        tell(f"weights: stay float with --method {args.method}: {args.model} has no plain nn.Linear to keep in INT8")
    return type(args)(**{**vars(args), **missing})


def _plain(optimizer):
    def build(model, args):
        from lowrank_sys import optim

        # the same split as the low-rank methods, so that embeddings, norms and head have their own rate here too
        plain, linear = optim.param_groups(model, rank=1, target_modules=args.target_modules)
        groups = [{"params": plain["params"], "lr": args.plain_lr}, {"params": linear["params"]}]
        return getattr(optim, optimizer)(groups, lr=args.lr, weight_decay=args.weight_decay)  # without a rank: plain AdamW

    return build


def _low_rank_groups(model, args, scale="scale", **keys):
    from lowrank_sys.optim import param_groups

    if args.int8_gemm:  # the optimizer refuses it where it cannot
        keys["int8_gemm"] = True
    return param_groups(
        model,
        rank=args.rank,
        target_modules=args.target_modules,
        update_proj_gap=args.update_proj_gap,
        proj_type=args.proj_type,
        subspace=args.subspace,
        seed=args.seed,
        plain={"lr": args.plain_lr},
        **{scale: args.scale},
        **keys,
    )


def _per_layer(args):
    import torch

    from lowrank_sys.optim import Accumulate, InBackward

    if args.per_layer == "in_backward":  # it clips by itself: nothing is left to clip for the trainer
        return InBackward(max_norm=args.grad_clip or None)
    if args.per_layer == "accumulate":
        return Accumulate(torch.bfloat16 if args.accumulate_dtype == "bf16" else torch.float32)
    return None


def _preset(name, scale="scale", more=lambda args: {}, **keys):
    """Builds optimizer `name`, whose group key `scale` is the flag --scale; keys: of its low-rank group.

    more: args -> further arguments of the optimizer.
    """

    def build(model, args):
        from lowrank_sys import optim

        groups = _low_rank_groups(model, args, scale, **keys)
        return getattr(optim, name)(groups, lr=args.lr, weight_decay=args.weight_decay, per_layer=_per_layer(args), **more(args))

    return build


def _galore_adafactor(model, args):
    from lowrank_sys.optim import GaLoreAdafactor

    # the rates of the flags are plain ones: neither relative to the step count nor to the size of a weight
    return GaLoreAdafactor(
        _low_rank_groups(model, args),
        lr=args.lr,
        weight_decay=args.weight_decay,
        relative_step=False,
        scale_parameter=False,
        per_layer=_per_layer(args),
    )


def _small_plain_state(args):
    # who keeps weights in INT8 has no room for fp32 moments of the embeddings
    return {"plain_8bit": args.weights == "int8"}


METHODS = {
    "adamw": Method(_plain("GaLoreAdamW"), lr=3e-4, plain_lr=1e-2, low_rank=False),
    "adamw8bit": Method(_plain("GaLoreAdamW8bit"), lr=3e-4, plain_lr=1e-2, low_rank=False),
    "galore": Method(_preset("GaLoreAdamW"), lr=5e-3, plain_lr=3e-3),
    "galore8bit": Method(_preset("GaLoreAdamW8bit"), lr=5e-3, plain_lr=3e-3),
    "q-galore": Method(_preset("QGaLoreAdamW8bit"), lr=5e-3, plain_lr=3e-3, weights="int8"),
    "galore-adafactor": Method(_galore_adafactor, lr=5e-3, plain_lr=3e-3),
    "apollo": Method(_preset("APOLLOAdamW", more=_small_plain_state), lr=2e-3, plain_lr=3e-3, scale=1.0),
    "apollo-mini": Method(
        _preset("APOLLOAdamW", more=_small_plain_state, scale_type="tensor"), lr=2e-3, plain_lr=3e-3, rank=1, scale=128.0
    ),
    "fira": Method(_preset("FiraAdamW", scale="alpha"), lr=2e-3, plain_lr=3e-3),
    "grass": Method(_preset("GrassAdamW"), lr=5e-3, plain_lr=3e-3, subspace="top"),
    "frugal": Method(_preset("FrugalAdamW"), lr=5e-4, plain_lr=3e-3, scale=1.0),
}

# Those that are known to need little memory: what `lowrank plan` tries where a run does not fit.
LEAN = ("galore8bit", "q-galore", "apollo-mini")


def build(model: torch.nn.Module, args: argparse.Namespace) -> LowRankOptimizer:
    """The optimizer of `args.method` over the parameters of `model`; its last group is the linear weights.

    Raises CommandError with the optimizer's own words, as for a rank above min(m, n) of a weight.
    """
    try:
        return METHODS[args.method].build(model, settle(args))
    except ValueError as error:
        raise CommandError(str(error)) from error
