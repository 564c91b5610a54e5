"""Every kernel and configuration fits every architecture: shared memory, registers, no spills, tensor cores in the products.

With --full each configuration is built once per architecture, in variants (side, types, arguments, sizes) chosen to cover all
pairs, and the step at r = 128 on both sides, with a basis in INT4 too. LOWRANK_COMPILE=all builds the full product (days).
"""

import importlib
import os
import pkgutil
import re

import pytest
import triton

from lowrank_sys import kernels
from lowrank_sys.bench.static import build, cards, cases
from lowrank_sys.bench.static.kernel import Row

# The lane has minutes, for all groups of kernels together.
MOST_BUILDS = 300


def test_the_cover_is_small():
    assert 0 < len(cases.cover()) <= MOST_BUILDS


def test_every_kernel_is_built():
    """A @triton.jit function whose name ends in _kernel is an entry of a group's KERNELS."""
    found = {
        function
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")
        for function in vars(importlib.import_module(module.name)).values()
        if isinstance(function, triton.JITFunction) and function.__name__.endswith("_kernel")
    }
    built = {kernel.function for kernel in cases.KERNELS.values()}
    assert "project_kernel" in {function.__name__ for function in found}
    assert not sorted(function.__name__ for function in found - built), "not in KERNELS of bench/static"


def chosen():
    """The cover; without --full of each configuration the required builds of sm_90, or those of one architecture, in turn."""
    if os.environ.get("LOWRANK_COMPILE") == "all":
        return cases.everything()
    cover, archs = cases.cover(), {}
    for case in cover:
        archs.setdefault(case.row, []).append(case.arch)
    turns = {}
    for i, (row, found) in enumerate(archs.items()):
        turns[row] = 90 if 90 in found and cases.required(90, row) else found[i % len(found)]
    return [case if case.arch == turns[case.row] else pytest.param(case, marks=pytest.mark.full) for case in cover]


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_fits(case, builds, proven):
    built = builds[case].result()
    assert built.shared <= cards.LIMITS[case.arch].block * 1024
    assert built.registers * built.threads <= cards.REGISTERS
    assert built.stack == built.local == 0, "spills"
    assert built.tensor_memory <= cards.TENSOR_MEMORY, "Triton makes such a kernel a trap"
    if cases.KERNELS[case.row.kernel].product:
        assert built.tensor_cores, "no tensor-core instruction"
        aligned = case.sizes == "aligned" and case in cases.required(case.arch, case.row)
        if aligned:
            assert built.wide("LDGSTS"), "operands are not copied 16 bytes at a time"
        if aligned and cases.KERNELS[case.row.kernel].own:
            own = build.OWN_TENSOR_CORE.get(case.arch, build.TENSOR_CORE)
            assert any(re.search(own, name) for name in built.tensor_cores), "not this architecture's tensor cores"
            assert built.wide("STG"), "results are not stored 16 bytes at a time"
    proven["triton"].append((case.row.kernel, case.row, case.arch, built))


def test_spills_are_seen(submit):
    """A tile far too large for its registers is reported as such: the reading of resources works."""
    case = cases.required(80, Row("apply", 32, 128))[0]
    arguments = cases.arguments(case)
    arguments["options"]["num_warps"] = 4
    arguments["constants"] |= {"BLOCK_M": 128, "BLOCK_N": 256}
    assert submit(**arguments).result().stack > 0


@pytest.mark.parametrize(
    "arch, registers, shared, threads, want",
    [
        (80, 32, 0, 256, 1.0),  # 8 blocks of 256 threads
        (80, 128, 0, 256, 0.25),  # 65536 registers are 512 threads of 128
        (80, 33, 0, 1024, 0.5),  # 40 a thread after rounding: one block of 1024
        (86, 32, 48 * 1024, 256, 2 * 256 / 1536),  # 49 KiB each of 100
        (90, 64, 0, 64, 0.5),  # 1024 threads of 64 registers
        (90, 32, 0, 32, 0.5),  # 32 blocks at most
        (89, 32, 100 * 1024, 128, 0.0),
    ],
)
def test_occupancy(arch, registers, shared, threads, want):
    assert cards.occupancy(arch, registers=registers, shared=shared, threads=threads) == pytest.approx(want)
