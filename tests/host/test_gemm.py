"""Thin fp32 products on every instruction set: csrc/cpu gives a plain loop's numbers, bit for bit, by 1 thread and by 3."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def builds():
    """The builds of the check that this processor runs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    return ["portable"] + ["v3"] * (capability in ("AVX2", "AVX512")) + ["v4", "address", "thread"] * (capability == "AVX512")


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
@pytest.mark.skipif(not builds(), reason="the builds are for x86")
def test_products_are_plain_loops(tmp_path):
    targets = [f"check_products_{name}" for name in builds()]
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, "-DLOWRANK_CHECKS=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", tmp_path, "--target", *targets], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for target in targets:
        ran = subprocess.run([tmp_path / target], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "ok\n"), target + ran.stdout + ran.stderr
