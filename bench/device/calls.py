"""A few small calls for the sanitizer, and a few large ones for the counters. No phases: what these run."""

import torch

from lowrank_sys.bench.cases import OPS, make, serving
from lowrank_sys.bench.cases.case import Case

SMALL = (
    "galore_step",
    "qgalore_step",
    "galore_step_8bit",
    "adam_8bit_",
    "adamw_step",
    "int8_update_",
    "int8_linear",
    "int8_linear_backward",
    "apollo_step",
    "fira_step",
    "grass_step",
    "quantize_int4",
)
LARGE = ("galore_step", "qgalore_step", "adam_8bit_", "int8_linear")


def small(setting):
    for name in SMALL:
        _call(name, 96, 160, 16, setting)()
    print(f"{len(SMALL)} calls")


def large(setting):
    size, rank = (64, 8) if setting.dry else (4096, 128)
    for name in LARGE:
        call = _call(name, size, size, rank, setting)
        call()
        if setting.dry:
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"{len(LARGE)} calls")


def _call(name, m, n, rank, setting):
    op = OPS[name]
    case = Case(name, m, n, rank if op.ranked else None, torch.bfloat16, True if op.sided else None, setting.device)
    tensors, function = make(case), serving(case)[1]
    return lambda: op.call(function, tensors, case)
