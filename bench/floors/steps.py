"""Promises of the optimizers' steps."""

import functools

import torch

from lowrank_sys.bench import kernels, optimizers, shapes, timing
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import CEILINGS, HERE, RANK, SIZE, Floor
from lowrank_sys.cli import CommandError


def over_gemms(op):
    """Time of a step over that of its bare GEMMs, on the worse side."""

    def measure(timer):
        ratios = []
        for left in (True, False):
            case = Case(op, SIZE, SIZE, RANK, torch.float32, left, "cpu")
            served = kernels.measure(case, timer, CEILINGS, seconds=5)[0]
            if served["check"] != "ok":
                raise CommandError(f"{op}, served by {served['variant']}: {served['check']}", code=1)
            ratios.append(served["ratio"])
        return max(ratios)

    return measure


def steady_step(ours, peer):
    """Time of the peer's steady step over ours."""

    def measure(timer):
        settings = optimizers.Settings([(SIZE, SIZE)], RANK, torch.float32, optimizers.NEVER, "cpu")
        row, _ = optimizers.measure(settings, (ours, peer), timer, base=peer, steps=30, svd=False)
        return 1 / row["ratio"]

    return measure


def model_over_gemms(timer):
    """Time of a steady step on llama-60m's matrices over that of their bare GEMMs."""
    settings = optimizers.Settings(shapes.matrices("llama-60m"), RANK, torch.float32, optimizers.NEVER, "cpu")
    row, _ = optimizers.measure(settings, ("lowrank", "gemms"), timer, base="gemms", steps=50, svd=False)
    return row["ratio"]


@functools.cache
def _model_cycle(timer):
    """Rows of llama-60m's matrices over two gaps."""
    settings = optimizers.Settings(shapes.matrices("llama-60m"), RANK, torch.float32, 200, "cpu")
    return optimizers.measure(settings, ("lowrank", "galore-torch"), timer, base="galore-torch", steps=2 * settings.gap, svd=True)


def amortised(timer):
    return 1 / _model_cycle(timer)[0]["amortised_ratio"]


def worst_step(timer):
    ours = _model_cycle(timer)[0]
    return ours["worst_s"] / ours["median_s"]


def overhead(timer):
    """Microseconds a matrix of a step on as many tiny matrices as llama-7b has weights."""
    return 1e6 * optimizers.overhead("lowrank", len(shapes.matrices("llama-7b")), "cpu")


def extra_memory(timer):
    """Most bytes a step holds beyond weights, gradients and state, over the bytes of the m x n matrix."""
    settings = optimizers.Settings([(SIZE, SIZE)], RANK, torch.float32, optimizers.NEVER, "cpu")
    optimizer = optimizers.build("lowrank", settings)
    optimizer.step()
    return timing.extra_bytes(optimizer.step, "cpu") / (4 * SIZE * SIZE)


FLOORS = [
    Floor(f"galore_step over its two bare GEMMs, {HERE}", "<= 1.15x", 1.15, over_gemms("galore_step"), False),
    Floor(f"frugal_step over its three bare GEMMs, {HERE}", "<= 1.15x", 1.15, over_gemms("frugal_step"), False),
    Floor(f"GaLoreAdamW step against galore-torch, {HERE}", ">= 1.8x faster", 1.8, steady_step("lowrank", "galore-torch"), True),
    Floor(
        f"GaLoreAdamW step with int8 products against galore-torch, {HERE}",
        ">= 3.5x faster",
        3.5,
        steady_step("lowrank-int8", "galore-torch"),
        True,
        narrow=1.8,
    ),
    Floor(f"APOLLOAdamW step against apollo-torch, {HERE}", ">= 2.3x faster", 2.3, steady_step("apollo", "apollo-torch"), True),
    Floor(
        f"GaLoreAdamW on llama-60m's 56 matrices over their bare GEMMs, r = {RANK}, fp32", "<= 1.15x", 1.15, model_over_gemms, False
    ),
    Floor("GaLoreAdamW on llama-60m, amortised over a gap of 200, against galore-torch", ">= 1.4x faster", 1.4, amortised, True),
    Floor("GaLoreAdamW on llama-60m, worst step over the median", "<= 2x", 2.0, worst_step, False),
    Floor("memory a step holds beyond the state, of an m x n matrix", "< 50%", 0.5, extra_memory, False, "{:.1%}", speed=False),
    Floor("overhead of a step a matrix, llama-7b's 224 weights", "<= 25 µs", 25.0, overhead, False, "{:.1f} µs"),
]
