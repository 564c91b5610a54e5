"""A run on several devices, by arithmetic on the rehearsal of one: what each holds, and what crosses the wire in a step.

ddp: every device holds all of the model, and gradients are all-reduced, or R where a gradient is never kept whole.
fsdp: fully_shard on each layer of the model and on the rest. Rows of weights, gradients and moments are dealt out as torch does it:
⌈rows/N⌉ to the first ones, so the first device holds most. A basis is on the right side, whole on every device.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

from lowrank_sys.memory.layout import SHARDED, Layout
from lowrank_sys.memory.rehearsal import Rehearsal


def spread(run: Rehearsal, args: argparse.Namespace) -> Rehearsal:
    """The rehearsal of one device as it is on the one that holds most. Of `args`, nproc and strategy."""
    if args.nproc == 1:
        return run
    made = run.layout
    if args.strategy == "ddp":
        buckets = {"buckets": _reduced(made, args)}
        at_peak, at_rest = run.at_peak | buckets, run.at_rest | buckets
    else:
        share = shares(made, args.nproc)
        # the layer at work and the next one, their gradients, and the rest of the model, which is kept from its forward on
        gathered = 2 * (made.rest + max(map(sum, zip(made.layers, made.layer_gradients)), default=0))
        at_peak, at_rest = _most(run.changes, share) | {"gathered": gathered}, _shared(run.at_rest, share)
    return run._replace(peak=sum(at_peak.values()), at_peak=at_peak, rest=sum(at_rest.values()), at_rest=at_rest)


def shares(run: Layout, n: int) -> dict[str, float]:
    """Of what fsdp deals out over n devices, the part of the first one, which holds most: {category: from 0 to 1}."""
    found = {category: _share([p for p in run.pieces if p.category == category], n) for category in SHARDED}
    return {**found, "gradients": _share(run.gradients, n)}


def _most(changes, share):
    """Bytes by part when the most is alive, of parts of which a device has its share."""
    now, most, at = 0, 0, 0
    for i, (part, size) in enumerate(changes, 1):
        now += size * share.get(part, 1)
        if now > most:
            most, at = now, i
    parts = Counter()
    for part, size in changes[:at]:
        parts[part] += size
    return _shared(parts, share)


def _shared(parts, share):
    return {part: math.ceil(size * share.get(part, 1)) for part, size in parts.items()}


def wire(run: Layout, args: argparse.Namespace) -> dict[str, float]:
    """Bytes handed to collective operations in a step, by part, and `sent`, what each device sends with rings.

    A refresh counts with its share of a step. Numbers (norms, flags) are left out. {} for one process.
    """
    n = args.nproc
    if n == 1:
        return {}
    if args.strategy == "ddp":
        parts = {"gradients": _reduced(run, args)}
        if args.per_layer == "accumulate":
            size = 2 if args.accumulate_dtype == "bf16" else 4
            parts["low-rank gradients"] = sum(size * matrix.low_rank for matrix in run.matrices)
            sent = (4 * m.d * m.columns + m.size * m.d * m.r if m.columns else 0 for m in run.matrices)
            parts["refreshes"] = sum(size / m.gap for size, m in zip(sent, run.matrices))
        return {**parts, "sent": 2 * (n - 1) / n * sum(parts.values())}
    weights, micro_batches = sum(run.layers), args.gradient_accumulation_steps
    parts = {
        "gathered weights": micro_batches * (2 * weights + run.rest),
        "scattered gradients": micro_batches * sum(piece.bytes for piece in run.gradients),
        "refreshes": sum(_renewed(matrix) / matrix.gap for matrix in run.matrices),
    }
    return {**parts, "sent": (n - 1) / n * (parts["gathered weights"] + parts["scattered gradients"] + 2 * parts["refreshes"])}


def _renewed(m):
    """Bytes of a refresh from an old basis: a product, two Gram matrices and two numbers a column are summed, the basis is sent."""
    return 4 * m.d * m.columns + 8 * m.columns * (m.columns + 1) + 4 * m.d * m.r if m.columns else 0


def _reduced(run, args):
    return run.plain if args.per_layer == "accumulate" else sum(piece.bytes for piece in run.gradients)


def _share(pieces, n):
    """Of the bytes of these pieces, the first device's part."""
    total, held = 0, 0
    for piece in pieces:
        total += piece.bytes
        held += piece.bytes * math.ceil(piece.rows / n) / piece.rows if piece.rows else piece.bytes
    return held / total if total else 1
