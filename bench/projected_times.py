"""Times of X B, backward and step of a model's linear layers: of AdamW, of GaLore, and of layers that give low-rank gradients."""

import random
import time
from typing import NamedTuple

import torch

from lowrank_sys.bench import report, timing
from lowrank_sys.nn import ProjectedLinear, project_model
from lowrank_sys.nn.linear_layers import linear_layers
from lowrank_sys.optim import GaLoreAdamW, param_groups
from lowrank_sys.train import models

BASES = ("adamw fused", "galore")
NEVER = 10**9  # steps between two refreshes: none is timed
SETTLED, FEW = 5, 64  # steps, of so many tokens, after which the first bases have come from gradients


class Spent(NamedTuple):
    """Seconds of one call's parts, by some clock."""

    narrow: float  # X B, which is a part of forward
    backward: float
    step: float


class Layers:
    """The linear layers of a model, each on its own, with an optimizer that sees no gradient of anything else."""

    def __init__(self, config, make, tokens):
        torch.manual_seed(0)
        model = models.build(config, dtype=torch.float32, device=torch.device("cpu"))
        self.optimizer = make(model)
        self.layers = [layer for _, layer in linear_layers(model)]
        self.inputs, self.gradients = {}, {}
        for _ in range(SETTLED):
            self(FEW)
        self.inputs, self.gradients = {}, {}
        self.tokens = tokens

    def __call__(self, tokens=None):
        """One backward and one step: (Spent in wall time, Spent in CPU time of all threads)."""
        tokens = self.tokens if tokens is None else tokens
        inputs = [self._input(layer, tokens) for layer in self.layers]
        outputs = [layer(x) for layer, x in zip(self.layers, inputs)]
        marks = [_clocks()]
        for layer, x, y in zip(self.layers, inputs, outputs):
            if isinstance(layer, ProjectedLinear):
                layer.projection.narrow(x, y.dtype)
        marks.append(_clocks())
        for x, y in zip(inputs, outputs):
            y.backward(self._drawn(self.gradients, y.shape[1], tokens))
            x.grad = None
        marks.append(_clocks())
        self.optimizer.step()
        marks.append(_clocks())
        self.optimizer.zero_grad()
        wall, cpu = zip(*marks)
        return tuple(Spent(*(b - a for a, b in zip(times, times[1:]))) for times in (wall, cpu))

    def _input(self, layer, tokens):
        return self._drawn(self.inputs, _width(layer), tokens).requires_grad_(True)

    @staticmethod
    def _drawn(kept, width, tokens):
        if width not in kept:
            kept[width] = torch.randn(tokens, width)
        return kept[width]

    def flop(self, rank):
        """Of one call, by formula: 2abc of a product (a, b) (b, c)."""
        total, seen = 0, set()
        for layer in self.layers:
            m, n = layer.weight.shape
            total += 2 * self.tokens * m * n  # dX
            if not isinstance(layer, ProjectedLinear):
                total += 2 * self.tokens * m * n  # G
                total += 4 * rank * m * n if isinstance(self.optimizer, GaLoreAdamW) else 0
                continue
            on = layer.projection
            once = on.shared is None or on.shared not in seen  # X B, of the layers that share it
            seen.add(on.shared)
            inner = _width(layer)
            total += 2 * self.tokens * rank * (m + n - (0 if once else inner)) + 2 * rank * m * n
        return total


def _width(layer):
    """Of its input: transformers' Conv1D calls it nx."""
    return layer.in_features if hasattr(layer, "in_features") else layer.nx


def _clocks():
    return time.perf_counter(), time.process_time()


def _galore(model, rank):
    return GaLoreAdamW(param_groups(model, rank, update_proj_gap=NEVER))


def contenders(rank, tokens):
    """{name: function from a model to its optimizer}."""

    def projected(side, share=False):
        return lambda model: _galore(project_model(model, rank, side, tokens=tokens, share=share), rank)

    return {
        "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "galore": lambda model: _galore(model, rank),
        "projected, left": projected("left"),
        "projected, right": projected("right"),
        "projected, right, shared": projected("right", share=True),
    }


def measured(model, names, *, rank, tokens, blocks=None, rounds=10):
    """({name: its Layers}, {name: its calls}) of interleaved rounds in random order, on the first blocks of a model, or all."""
    config = models.config(model)
    config.num_hidden_layers = min(blocks or config.num_hidden_layers, config.num_hidden_layers)
    makers = contenders(rank, tokens)
    running = {name: Layers(config, makers[name], tokens) for name in names}
    calls = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            calls[name].append(running[name]())
    return running, calls


def times_faster(calls, name, base, clock=0):
    """Median over the rounds of how many times as long the base takes. clock: 0 wall time, 1 CPU time."""
    ours, theirs = ([sum(call[clock]) for call in calls[one]] for one in (name, base))
    return timing.quantile([b / a for a, b in zip(ours, theirs)], 0.5)


def rows(args):
    """A row a contender."""
    names = tuple(contenders(args.rank, args.tokens))
    running, calls = measured(args.model, names, rank=args.rank, tokens=args.tokens, blocks=args.blocks, rounds=args.rounds)
    return [
        {
            "variant": name,
            "model": args.model,
            "layers": len(running[name].layers),
            "rank": args.rank,
            "tokens": args.tokens,
            "flop": running[name].flop(args.rank),
            "samples": args.rounds,
            **_figures(calls, name),
        }
        for name in names
    ]


def _figures(calls, name):
    wall = [spent for spent, _ in calls[name]]
    found = {f"{part}_s": timing.quantile([getattr(spent, part) for spent in wall], 0.5) for part in Spent._fields}
    found["total_s"] = timing.quantile([sum(spent) for spent in wall], 0.5)
    for base in BASES:
        for clock, suffix in enumerate(("", "_cpu")):
            found[f"over_{base.split()[0]}{suffix}"] = times_faster(calls, name, base, clock)
    return found


def _ratio(base):
    return lambda row: f"{row[f'over_{base}']:.2f}x ({row[f'over_{base}_cpu']:.2f}x)"


COLUMNS = [
    ("variant", lambda row: row["variant"]),
    ("GFLOP", lambda row: report.number(row["flop"] / 1e9)),
    ("X B", lambda row: report.seconds(row["narrow_s"])),
    ("backward", lambda row: report.seconds(row["backward_s"])),
    ("step", lambda row: report.seconds(row["step_s"])),
    ("together", lambda row: report.seconds(row["total_s"])),
    ("faster than AdamW (in CPU time)", _ratio("adamw")),
    ("than galore", _ratio("galore")),
]
