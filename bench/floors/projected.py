"""Promises of layers that give low-rank gradients: X B, backward and step of their linear layers."""

from lowrank_sys.bench.floors.floor import Floor
from lowrank_sys.bench.projected_times import measured, times_faster

RANK, TOKENS = 128, 2048
SIDES = ("projected, left", "projected, right")


def faster_than(base, model, blocks=None):
    """How many times as long as the slower of the two sides the base takes."""

    def measure(timer):
        _, calls = measured(model, (base, *SIDES), rank=RANK, tokens=TOKENS, blocks=blocks, rounds=7)
        return min(times_faster(calls, side, base) for side in SIDES)

    return measure


def _line(layers, base):
    return f"backward and step of ProjectedLinear on {layers}, {TOKENS} tokens, r = {RANK}, fp32, against {base}"


FLOORS = [
    Floor(_line("llama-60m's layers", "AdamW's fused step"), ">= 1x faster", 1.0, faster_than("adamw fused", "llama-60m"), True),
    Floor(_line("llama-60m's layers", "GaLoreAdamW"), ">= 1.25x faster", 1.25, faster_than("galore", "llama-60m"), True),
    Floor(_line("a block of llama-1b", "GaLoreAdamW"), ">= 1.4x faster", 1.4, faster_than("galore", "llama-1b", blocks=1), True),
]
