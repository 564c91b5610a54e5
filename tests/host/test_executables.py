"""csrc outside of Python: no race, no overrun, no undefined behaviour; every instruction set gives the bits of core."""

import platform
from pathlib import Path

import pytest
import torch

CPUINFO = Path("/proc/cpuinfo")
# Of csrc/host/check/*_vectors.cpp: the builds without a sanitizer, from the narrowest instruction set to the widest.
VECTORS = {
    "int8": ("v3", "v4"),
    "blockwise": ("v3", "v4"),
    "int8_gemm": ("portable", "v3", "v4", "vnni"),
    "gemm": ("portable", "v3", "v4"),
}


def runs():
    """The instruction sets that this processor has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    has_vnni = capability == "AVX512" and CPUINFO.exists() and "avx512_vnni" in CPUINFO.read_text()
    return ["portable"] + ["v3"] * (capability in ("AVX2", "AVX512")) + ["v4"] * (capability == "AVX512") + ["vnni"] * has_vnni


def executables():
    """All of them; without --full of each the one that the package chooses here."""
    chosen = []
    for kernels, builds in VECTORS.items():
        *others, widest = [f"{kernels}_{build}" for build in builds if build in runs()] or [None]
        chosen += [pytest.param(name, marks=pytest.mark.full) for name in others] + [widest] * (widest is not None)
    return chosen + ["gemm_thread", "gemm_address"] * ("v4" in runs())


@pytest.mark.parametrize("check", executables(), indirect=True)
def test_vectors_are_core(check):
    """Tiles and vectors by hand against plain loops; products by one thread and by several, these under the sanitizers too."""
    done = check()
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


@pytest.mark.parametrize("check", ["thread", "address"], indirect=True)
def test_sanitizer(check, count):
    """Every block algorithm with 1, 32 and 256 threads; the address sanitizer's build looks for undefined behaviour, too."""
    # At once: threads that a race has parted wait for each other at a barrier for ever.
    done = check(TSAN_OPTIONS="halt_on_error=1")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
    for sanitizer in ("address", "undefined") if check.name == "address" else (check.name,):
        count("sanitizer", sanitizer)


@pytest.mark.parametrize("check", ["race"], indirect=True)
def test_thread_sanitizer_sees_a_race(check):
    done = check()
    assert done.returncode != 0
    assert "data race" in done.stderr
