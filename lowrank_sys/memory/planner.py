"""The plan: what a run will need before it runs, whether that fits, and what would make it fit.

    process peak = baseline + peak of live tensors, scratch inside operators included + what the allocator holds beyond them

The tensors are counted on a rehearsal of the real run (rehearsal), the baseline is measured in a fresh process (process), the
allocator's share is stated (allocator). A change is suggested only after it was planned in the same way.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

from lowrank_sys.cli import CommandError
from lowrank_sys.memory import allocator, devices, process
from lowrank_sys.memory.rehearsal import Rehearsal, rehearse
from lowrank_sys.optim.ledger import CATEGORIES
from lowrank_sys.train.flags import check
from lowrank_sys.train.methods import LEAN, settle

PARTS = (*CATEGORIES, "activations", "workspace")


class Planner:
    """Plans of `args` (those of `lowrank train`, checked) and of variants.

    memory: bytes of the device, None: unknown. tell: called with a line before something that takes seconds.
    """

    def __init__(self, args: argparse.Namespace, memory: int | None, tell: Callable[[str], None]):
        self._args = args
        self._memory = memory
        self._tell = tell
        self._rehearsals: dict[tuple, Rehearsal] = {}
        tell("measuring a process without tensors")
        self.baseline = process.measure(args)

    def plan(self, **changes: Any) -> dict[str, Any]:
        """Bytes by part for the run with `changes` to its arguments, as plain JSON values."""
        run = self._rehearse(changes)
        held, tight = self._allocator(run, self._changed(changes))
        training = self.baseline.training + run.peak + held
        finishing = self.baseline.finishing + run.rest + held  # plots and files
        peak = max(training, finishing)
        return {
            "tensors": {part: run.at_peak.get(part, 0) for part in (*PARTS, *sorted(run.at_peak.keys() - PARTS))},
            "tensor_peak_bytes": run.peak,
            "tensors_between_steps_bytes": run.rest,
            "process_baseline_bytes": self.baseline.training,
            "process_baseline_measured": self.baseline.measured,
            "allocator_bytes": held,
            "allocator_tight": tight,
            "training_peak_bytes": training,
            "finishing_peak_bytes": finishing,
            "peak_bytes": peak,
            "fits": None if self._memory is None else peak <= self._memory,
            "wire_bytes_per_step": devices.wire(run.layout, self._changed(changes)),
        }

    def _rehearse(self, changes: dict[str, Any]) -> Rehearsal:
        """The run with `changes` as it is on the device that holds most."""
        changed, alone = self._changed(changes), {name: value for name, value in changes.items() if name != "nproc"}
        key = tuple(sorted(alone.items()))
        if key not in self._rehearsals:
            self._tell(f"rehearsing {described(alone) or 'the run'}")
            self._rehearsals[key] = rehearse(changed)
        return devices.spread(self._rehearsals[key], changed)

    def _changed(self, changes: dict[str, Any]) -> argparse.Namespace:
        changed = argparse.Namespace(**{**vars(self._args), **changes})
        check(changed)
        if changed.strategy == "fsdp":  # its rows are dealt out, so that the basis is on the other side
            changed.proj_type = "right"
        return changed

    def _allocator(self, run: Rehearsal, args: argparse.Namespace) -> tuple[int, bool]:
        """Bytes held beyond the tensors, and whether `lowrank train` would have freed blocks go back."""
        if self._args.device == "cuda":
            return round(allocator.CUDA_SHARE * run.peak), False
        memory = self._memory or allocator.available_bytes()
        available = memory - self.baseline.training - run.at_rest["weights"]  # `lowrank train` asks when the weights are there
        tight = allocator.is_saving() or allocator.should_save(settle(args), run.model, available)
        return round(allocator.TIGHT_SHARE * run.peak if tight else allocator.HEAP_SHARE * run.in_heap), tight

    def other_checkpointing(self) -> dict[str, Any] | None:
        """The plan with gradient checkpointing where the run has none, and the reverse; None for a model that has none."""
        try:
            return self.plan(gradient_checkpointing=not self._args.gradient_checkpointing)
        except CommandError:
            return None

    def suggestions(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(changes that make the run fit, the smallest plan found); a change: {"flags", "peak_bytes"}, every one planned.

        First the allocator's, where the run would not find memory tight by itself; all single changes that do, of every
        family in `_changes` the mildest (every method of LEAN); else the first combination.
        """
        plan = self.plan()
        unchanged = plan["peak_bytes"]
        fitting, best = [], []
        if not plan["allocator_tight"] and self._args.device == "cpu":
            saving = unchanged - plan["allocator_bytes"] + round(allocator.TIGHT_SHARE * plan["tensor_peak_bytes"])
            if saving <= self._memory:
                fitting.append((saving, {allocator.VARIABLE: allocator.MMAP_THRESHOLD}))
        for family in _changes(self._args):
            planned = []
            for change in family:
                planned.append((self._peak(change), change))
                if planned[-1][0] <= self._memory:
                    fitting.append(planned[-1])
                    if "method" not in change:
                        break
            best += [min(planned, key=lambda pair: pair[0])] if planned else []
        smallest = min([(unchanged, {}), *best], key=lambda pair: pair[0])
        least, together = unchanged, {}
        for peak, change in best:
            if fitting:
                break
            if peak < unchanged and (peak := self._peak(together | change)) < least:
                least, together = peak, together | change
                smallest = min(smallest, (least, together), key=lambda pair: pair[0])
                fitting += [smallest] if least <= self._memory else []
        return [_change(*pair) for pair in fitting], _change(*smallest)

    def _peak(self, changes: dict[str, Any]) -> float:
        try:
            return self.plan(**changes)["peak_bytes"]
        except CommandError:
            return math.inf  # the method or the model refuses it


def _changes(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Families of changes, the ones that alter the training least first; in a family from mild to strong."""
    if not args.gradient_checkpointing:
        yield [{"gradient_checkpointing": True}]
    sizes = []
    while args.batch_size >> (len(sizes) + 1):
        size = args.batch_size >> (len(sizes) + 1)
        # as many sequences a step as before
        micro_batches = -(-args.batch_size * args.gradient_accumulation_steps // size)
        sizes.append({"batch_size": size, "gradient_accumulation_steps": micro_batches})
    yield sizes
    if args.per_layer is None:
        yield [{"per_layer": "in_backward"}]
        yield [{"per_layer": "accumulate"}, {"per_layer": "accumulate", "accumulate_dtype": "bf16"}]
    elif args.per_layer == "accumulate" and args.accumulate_dtype == "fp32":
        yield [{"accumulate_dtype": "bf16"}]
    if args.dtype == "fp32":
        yield [{"dtype": "bf16"}]
    if settle(args).weights == "float":
        yield [{"weights": "int8"}]
    yield [{"method": method} for method in LEAN if method != args.method]
    if args.strategy == "fsdp":
        yield [{"nproc": args.nproc << doublings} for doublings in (1, 2, 3)]
    rank = settle(args).rank
    if isinstance(rank, float):
        yield [{"rank": rank / 2**halvings} for halvings in (1, 2, 3)]
    else:
        yield [{"rank": rank >> halvings} for halvings in (1, 2, 3) if rank is not None and rank >> halvings >= 4]


def described(changes: dict[str, Any]) -> str:
    if allocator.VARIABLE in changes:
        return f"{allocator.VARIABLE}={changes[allocator.VARIABLE]} in the environment"
    return " ".join(
        f"{'no ' if value is False else ''}--{name.replace('_', '-')}{'' if isinstance(value, bool) else f' {value}'}"
        for name, value in changes.items()
    )


def _change(peak: int, changes: dict[str, Any]) -> dict[str, Any]:
    return {"flags": described(changes), "peak_bytes": peak}
