"""What `lowrank train` takes by itself where quantized weights would not fit as the flags say: per-layer updates, checkpointing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from lowrank_sys.cli import CommandError
from lowrank_sys.memory import allocator, units
from lowrank_sys.memory.planner import described
from lowrank_sys.memory.process import CUDA_CONTEXT
from lowrank_sys.memory.rehearsal import Rehearsal, rehearse

# Flags that are left to `choose`, and what they are where nobody gave them.
OPEN = {"gradient_checkpointing": False, "per_layer": None}


def device_memory(device: torch.device) -> int:
    """Bytes that a run may take: all of a GPU, or what is free for this process on a CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else allocator.available_bytes()


def choose(args: argparse.Namespace, memory: int, tell=lambda line: None) -> dict[str, Any]:
    """Changes to `args` (those of `lowrank train`, settled) with which the run fits into `memory` bytes; {} if it does as it is.

    Only quantized weights are fitted, and only flags that nobody gave are changed: what alters the training least first,
    checkpointing, then per-layer updates, then both. Each is rehearsed, but for those that the parts of the first rehearsal rule
    out. tell: called with one line if something is changed. Raises CommandError, one line, if nothing that is left open makes it
    fit.
    """
    if args.as_given or args.weights == "float" or not _is_open(args):
        return {}
    run = rehearse(args)
    planned = needed(args, run)
    if planned <= memory:
        return {}
    least, leanest = planned, {}
    for change in _changes(args):
        if needed(args, run, without=_spared(change)) > memory:
            continue
        changed = argparse.Namespace(**{**vars(args), **change})
        try:
            size = needed(changed, rehearse(changed))
        except CommandError:  # the method refuses it
            continue
        if size <= memory:
            tell(
                f"memory: {units.show(planned)} planned as given, {units.show(memory)} there: takes {described(change)}, "
                f"{units.show(size)} planned (--as-given keeps the flags as they are)"
            )
            return change
        least, leanest = min((least, leanest), (size, change), key=lambda pair: pair[0])
    best = f", {units.show(least)} with {described(leanest)}" if leanest else ""
    raise CommandError(
        f"memory: {units.show(planned)} planned as given{best}, {units.show(memory)} there: `lowrank plan "
        "--device-memory` says what would fit; --as-given runs all the same"
    )


def needed(args: argparse.Namespace, run: Rehearsal, without: tuple[str, ...] = ()) -> int:
    """Bytes of a device that a run takes: its tensors but those of the parts `without`, what the allocator holds beyond them
    and, on a GPU, the context. What the process holds already is no longer free, so it counts nowhere else."""
    tensors = run.peak - sum(run.at_peak.get(part, 0) for part in without)
    if args.device == "cuda":
        return CUDA_CONTEXT + round((1 + allocator.CUDA_SHARE) * tensors)
    return round((1 + allocator.TIGHT_SHARE) * tensors)


def _is_open(args: argparse.Namespace) -> list[str]:
    return [name for name, unset in OPEN.items() if getattr(args, name) == unset]


def _changes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The changes that are left, the mildest first."""
    mode = "in_backward" if args.gradient_accumulation_steps == 1 else "accumulate"
    values = {"gradient_checkpointing": True, "per_layer": mode}
    left = {name: values[name] for name in _is_open(args)}
    yield from ({name: value} for name, value in left.items())
    if len(left) > 1:
        yield left


def _spared(change: dict[str, Any]) -> tuple[str, ...]:
    """The parts that a change can shrink: at the peak of the run as given, all others are alive with it too."""
    parts = {"gradient_checkpointing": ("activations",), "per_layer": ("gradients", "activations", "workspace")}
    return tuple({part for name in change for part in parts[name]})
