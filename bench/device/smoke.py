"""Every op once, on both sides of the basis and in fp32 and bf16, against fp64."""

import functools
import itertools

import torch

from lowrank_sys.bench import kernels, shapes
from lowrank_sys.bench.cases import OPS, serving
from lowrank_sys.bench.cases.case import Case

SIZE, RANK = (512, 768), 64
TOY, TOY_RANK = (40, 64), 8
RESERVE = 4.0  # seconds, to compile kernels in


def run(setting):
    (m, n), rank = (TOY, TOY_RANK) if setting.dry else (SIZE, RANK)
    # every op once before any op again
    cases = [
        Case(name, m, n, rank if OPS[name].ranked else None, dtype, left if OPS[name].sided else None, setting.device)
        for dtype, left, name in itertools.product((torch.bfloat16, torch.float32), (True, False), setting.ops)
        if left or OPS[name].sided
    ]
    setting.each(
        {" ".join(filter(None, (c.op, shapes.SPELLING[c.dtype], c.side))): functools.partial(_checked, c) for c in cases},
        reserve=0.0 if setting.dry else RESERVE,
    )


def _checked(case):
    name, function = serving(case)
    check = kernels.Check(case)
    figures = check.figures(function)
    yield {
        "op": case.op,
        "shape": f"{case.m}x{case.n}",
        "rank": case.rank,
        "dtype": shapes.SPELLING[case.dtype],
        "side": case.side,
        "served": name,
        **figures,
        "oracle_error": check.oracle["error"],
        "check": check.verdict(figures),
    }
