"""Every op beside what else one could call, at the sizes of LLaMA-7B: time on the GPU, time of the host, launches.

The most important first: what the time does not suffice for is the least.
"""

import contextlib
import functools
import itertools

import torch

from lowrank_sys.bench import kernels, machine, shapes, timing
from lowrank_sys.bench.cases import ONCE, OPS, PACKAGES, copies, int8, make, serving
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.device import facts

FIRST = (
    "galore_step",
    "qgalore_step",
    "adam_8bit_",
    "int8_update_",
    "grass_step",
    "int8_linear",
    "int8_linear_backward",
    "refresh_",
)
SHAPES, RANKS, MORE_RANKS, TOKENS = ((4096, 4096), (4096, 11008), (11008, 4096)), (128, 1024), (256, 512), (256, 2048)
TOY = ((32, 32), (24, 40)), (4,), (6,), (16,)
ON_TOKENS = ("int8_linear", "int8_linear_backward")
ROUNDS, TOY_ROUNDS = 20, 2
# Side of the largest matrix on which a basis is compared with the best one, which takes an eigendecomposition in fp64.
CHOSEN = 2048
# Seconds that a case may take to compile, check and measure: none begins with less left.
RESERVE = 6.0


def run(setting):
    ceilings = facts.ceilings(setting)
    setting.write(ceilings=ceilings, **machine.describe(setting.device))
    absent = {name for name, package in PACKAGES.items() if machine.absent(*package)}
    bench = Bench(timing.Timer(setting.device), ceilings, absent, TOY_ROUNDS if setting.dry else ROUNDS)
    setting.each(
        {name: functools.partial(bench.rows, case, tokens) for name, case, tokens in cases(setting)},
        reserve=0.0 if setting.dry else RESERVE,
    )


def cases(setting):
    """(name, Case, tokens or None), the most important first, each once."""
    sizes, ranks, more, counts = TOY if setting.dry else (SHAPES, RANKS, MORE_RANKS, TOKENS)
    first = [name for name in FIRST if name in setting.ops]
    rest = [name for name in setting.ops if name not in FIRST]
    plan = [
        *itertools.product(first, ranks, sizes, [False]),
        *itertools.product(first, more, sizes, [False]),
        *itertools.product(rest, ranks[:1], sizes[:1], [False]),
        *itertools.product(first, ranks[:1], sizes, [True]),
        *itertools.product(rest, ranks[1:], sizes[:1], [False]),
        *itertools.product(rest, ranks[:1], sizes[:1], [True]),
    ]
    found = {}
    for op, rank, (m, n), other in plan:
        left = (m < n) != other if OPS[op].sided else None  # as GaLore has it, or the other side
        case = Case(op, m, n, rank if OPS[op].ranked else None, torch.bfloat16, left, setting.device)
        for tokens in counts if op in ON_TOKENS else (None,):
            name = [op, f"{m}x{n}", case.rank and f"r={case.rank}", case.side, tokens and f"{tokens} tokens"]
            found[" ".join(filter(None, name))] = (case, tokens)
    return [(name, *what) for name, what in found.items()]


class Bench:
    def __init__(self, timer, ceilings, absent, rounds):
        self.timer, self.ceilings, self.absent, self.rounds = timer, ceilings, absent, rounds
        self.once = {}  # (base, m, n) -> seconds of what is timed once

    def rows(self, case, tokens):
        with int8.tokens(tokens) if tokens else contextlib.nullcontext():
            yield from self._rows(
                case,
                {
                    "op": case.op,
                    "shape": f"{case.m}x{case.n}",
                    "rank": case.rank,
                    "side": case.side,
                    "dtype": shapes.SPELLING[case.dtype],
                    "tokens": tokens,
                },
            )
        if self.timer.device.type == "cuda":
            self.timer.prepared = {}
            torch.cuda.empty_cache()  # the next case's graphs have pools of their own

    def _rows(self, case, names):
        op, (served, function) = OPS[case.op], serving(case)
        check = kernels.Check(case._replace(m=min(case.m, CHOSEN), n=min(case.n, CHOSEN)) if op.chooses else case)
        figures = check.figures(function)
        verdict = check.verdict(figures)
        inputs, functions = make(case), {}
        if verdict == "ok":
            tensors = copies(inputs)
            functions[served] = lambda: op.call(function, tensors, case)
        single = {}
        for base, build in op.bases.items():
            if base in ONCE and case.m != case.n:
                continue  # it takes longer than all the rest; one shape says how much
            if base in self.absent:
                yield names | {"variant": base, "skipped": f"{PACKAGES[base][1]} is not installed"}
                continue
            try:
                peer = build(copies(inputs), case)
                if base in ONCE:
                    key = (base, case.m, case.n)
                    if key not in self.once:
                        self.once[key] = self.timer(peer)
                    single[base] = self.once[key]
                else:
                    peer()
                    functions[base] = peer
            except Exception as error:  # a peer that cannot do it says so; the rest is measured
                yield names | {"variant": base, "skipped": f"{type(error).__name__}: {error}"}
                self.timer.synchronize()
        times = self.timer.interleave(functions, seconds=0, at_least=self.rounds, at_most=self.rounds)
        limits = kernels.bounds(case, self.ceilings)
        bound = {"bound": op.other or max(limits, key=limits.get), "roofline_s": max(limits.values())}
        if verdict != "ok":
            yield names | {"variant": served, "check": verdict, **figures}
        for variant, samples in times.items():
            own = {"check": verdict, **figures} if variant == served else {}
            over = {base: timing.ratio([samples], [others])[0] for base, others in times.items() if base != served}
            over |= {base: timing.quantile(samples, 0.5) / seconds for base, seconds in single.items()}
            yield (
                names
                | _figures(samples, bound)
                | bound
                | {"variant": variant}
                | own
                | ({"over": over} if variant == served else {})
                | kernels.launching(self.timer.prepared[variant])
            )
        for variant, seconds in single.items():
            yield names | _figures([seconds], bound) | bound | {"variant": variant}


def _figures(samples, bound):
    found = timing.spread([samples])
    return {
        "median_s": found.median,
        "p20_s": found.p20,
        "p80_s": found.p80,
        "samples": len(samples),
        "roofline": bound["roofline_s"] / found.median,
    }
