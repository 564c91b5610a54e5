"""`lowrank plan`: the flags, and how a plan is told."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lowrank_sys.cli import CommandError, say
from lowrank_sys.memory import units
from lowrank_sys.train import flags
from lowrank_sys.train.methods import settle

NO_FIT = 3
# As lowrank_sys.memory.devices has them, which takes torch to import.
STRATEGIES = ("ddp", "fsdp")

KINDS = {
    "weights": "and buffers",
    "gradients": "alive at the peak",
    "basis": "of the low-rank matrices",
    "moments": "of the inner rule",
    "activations": "saved for backward, and their gradients",
    "workspace": "scratch of clipping and step",
    "buckets": "of gradients that are being reduced",
    "gathered": "whole layers at work, and their gradients",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lowrank train`, and those of the plan; imports nothing heavy."""
    flags.add_arguments(parser)
    parser.description = (
        "Say what a run of `lowrank train` with the same flags will need, before it runs: put `plan` in the place of `train`. "
        "Two steps are rehearsed on tensors that hold nothing; the process without tensors is measured in a fresh one. "
        f"Exit code {NO_FIT}: it does not fit."
    )
    add = parser.add_argument
    add("--device-memory", metavar="SIZE", help="memory of the device, as 24GiB: says whether the run fits, and what would")
    add("--nproc", metavar="N", type=int, default=1, help="devices that share the work, each with --batch-size (default: 1)")
    add(
        "--strategy",
        metavar="NAME",
        default="ddp",
        help="how several devices do: ddp, the whole model on each, or fsdp, rows of weights, gradients and moments dealt out "
        "(default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0, or NO_FIT where the run does not fit. Raises CommandError, code 2 for bad input."""
    memory = None if args.device_memory is None else units.parse(args.device_memory, "--device-memory")
    flags.check(args)
    _check_devices(args)
    try:
        result = make(args, memory)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; pip install 'lowrank-sys[train]' brings it", code=1) from error
    print(json.dumps(result, indent=1) if args.json else report(result))
    return NO_FIT if result["fits"] is False else 0


def _check_devices(args: argparse.Namespace) -> None:
    if args.nproc < 1:
        raise CommandError(f"--nproc: got {args.nproc}; it must be at least 1")
    if args.strategy not in STRATEGIES:
        raise CommandError(f"--strategy: unknown {args.strategy!r}; valid: {', '.join(STRATEGIES)}")
    if args.nproc > 1 and args.per_layer is not None and (args.per_layer, args.strategy) != ("accumulate", "ddp"):
        raise CommandError(f"--per-layer {args.per_layer} is for one process, got --nproc {args.nproc} --strategy {args.strategy}")
    if args.nproc > 1 and args.projected is not None:
        raise CommandError(f"--projected {args.projected} is planned for one process, got --nproc {args.nproc}")


def make(args: argparse.Namespace, memory: int | None) -> dict[str, Any]:
    """The plan of `args` (checked) for a device with `memory` bytes, as plain JSON values."""
    import torch
    import transformers

    from lowrank_sys.memory.planner import Planner

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = {"auto": "bf16" if args.device == "cuda" else "fp32"}.get(args.dtype, args.dtype)

    quantized = settle(args, say).weights != "float"
    if quantized and args.nproc > 1 and args.strategy == "ddp" and args.per_layer is None:
        args.per_layer = "accumulate"  # as `lowrank train` takes it then
    planner = Planner(args, memory, tell=lambda line: say(f"{line} ..."))
    plan = planner.plan()
    turned = planner.other_checkpointing()
    turned = None if turned is None else turned["tensors"]["activations"]
    with_, without = (plan["tensors"]["activations"], turned)[:: 1 if args.gradient_checkpointing else -1]
    result = {
        "model": args.model,
        "method": args.method,
        "device": args.device,
        "dtype": args.dtype,
        "device_memory_bytes": memory,
        "nproc": args.nproc,
        "strategy": args.strategy if args.nproc > 1 else None,
        **plan,
        "activations_with_checkpointing_bytes": with_,
        "activations_without_checkpointing_bytes": without,
    }
    if plan["fits"] is False:
        result["would_fit"], result["smallest"] = planner.suggestions()
    return result


def report(plan: dict[str, Any]) -> str:
    """The plan as a table for people."""
    rows = [(name, size, KINDS.get(name, "")) for name, size in plan["tensors"].items() if size]
    measured = (
        "libraries, threads, corpus: measured in a fresh process"
        if plan["process_baseline_measured"]
        else ("CUDA context and libraries: stated, not measured")
    )
    rows += [
        ("tensors, peak", plan["tensor_peak_bytes"], "counted over two rehearsed steps"),
        ("process", plan["process_baseline_bytes"], measured),
        ("allocator", plan["allocator_bytes"], "held beyond the tensors: stated"),
        ("peak", plan["peak_bytes"], ""),
    ]
    if plan["peak_bytes"] > plan["training_peak_bytes"]:
        rows[-1] = ("peak", plan["peak_bytes"], "at the end, when plots and files are made")
    several = f", each of {plan['nproc']} by {plan['strategy']}" if plan["nproc"] > 1 else ""
    lines = [f"{plan['model']}, {plan['method']}, {plan['dtype']} on {plan['device']}{several}"]
    lines += [f"  {name:<16}{units.show(size):>12}  {note}".rstrip() for name, size, note in rows]
    with_, without = (plan[f"activations_{w}_checkpointing_bytes"] for w in ("with", "without"))
    known = "not possible" if with_ is None else units.show(with_)
    lines.append(f"activations at the peak: {known} with --gradient-checkpointing, {units.show(without)} without")
    if plan["wire_bytes_per_step"]:
        crossing = {name: units.show(round(size)) for name, size in plan["wire_bytes_per_step"].items()}
        sent = crossing.pop("sent")
        lines.append(f"on the wire in a step: {', '.join(f'{name} {size}' for name, size in crossing.items())}")
        lines.append(f"each device sends {sent}, with rings")
    if plan["fits"] is None:
        return "\n".join(lines)
    memory = units.show(plan["device_memory_bytes"])
    if plan["fits"]:
        spare = units.show(plan["device_memory_bytes"] - plan["peak_bytes"])
        return "\n".join([*lines, f"fits into {memory}: {spare} to spare"])
    lines.append(f"does not fit into {memory}: {units.show(plan['peak_bytes'] - plan['device_memory_bytes'])} too much")
    lines += [f"  would fit: {change['flags']}  ({units.show(change['peak_bytes'])})" for change in plan["would_fit"]]
    if not plan["would_fit"]:
        smallest = plan["smallest"]
        lines.append(
            f"  nothing that was tried fits; the least: {units.show(smallest['peak_bytes'])} "
            f"with {smallest['flags'] or 'no change'}"
        )
    return "\n".join(lines)
