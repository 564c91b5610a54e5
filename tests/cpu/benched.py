"""What the tests of `lowrank bench` share."""

import pytest
from threads import threads

from lowrank_sys import cli
from lowrank_sys.bench import kernels, machine, optimizers, timing

CEILINGS = {"copy_gb_per_s": 10.0, "gemm_gflop_per_s": {"float32": 100.0, "bfloat16": 100.0, "float16": 100.0}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_largest_cache", lambda: 0)
    monkeypatch.setattr(timing, "LEAST_FILL", 1 << 10)
    monkeypatch.setattr(timing._Stolen, "_seconds", lambda self: 0.0)
    monkeypatch.setattr(optimizers, "OVERHEAD_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "PASSES", 2)
    monkeypatch.setattr(machine, "ceilings", lambda timer, dtypes: dict(CEILINGS))
    with threads(1):
        yield


def run(capsys, *argv):
    code = cli.main(["bench", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def run_kernels(capsys, *argv):
    return run(capsys, "kernels", "--device", "cpu", "--seconds", "0", *argv)
