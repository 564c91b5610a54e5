"""Every Triton kernel, one module a group, and which of its builds stand for all."""

import itertools

from lowrank_sys.bench.static import apply, gaussian, int8, int8_gemm, rules, scatter_add, steps
from lowrank_sys.bench.static.kernel import Row, always, variants
from lowrank_sys.kernels import configs

GROUPS = (steps, rules, apply, int8, int8_gemm, gaussian, scatter_add)
KERNELS = {name: kernel for group in GROUPS for name, kernel in group.KERNELS.items()}
ARCHS = tuple(configs.TABLES)


def product():
    """Every architecture with every configuration."""
    return [(arch, Row(name, *row)) for arch in ARCHS for name, kernel in KERNELS.items() for row in kernel.rows(arch)]


def arguments(case):
    """Arguments of `build.compile_triton`."""
    return case.arguments(KERNELS[case.row.kernel])


def required(arch, row):
    return always(arch, row, KERNELS[row.kernel])


def everything():
    """All that the launchers can ask for: days of compilation."""
    return [case for arch, row in product() for case in variants(arch, row, KERNELS[row.kernel])]


def pairs(case):
    return set(itertools.combinations(zip(case._fields, case), 2))


def cover():
    """The required builds, and one variant (side, types, arguments, sizes) of each other configuration on each architecture,
    chosen greedily to cover all pairs."""
    chosen = [case for group in product() for case in required(*group)]
    covered = set().union(*map(pairs, chosen))
    for arch, row in product():
        if not required(arch, row):
            best = max(variants(arch, row, KERNELS[row.kernel]), key=lambda case: len(pairs(case) - covered))
            covered |= pairs(best)
            chosen.append(best)
    return chosen
