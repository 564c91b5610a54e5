"""The tests of the GPU lane, by this interpreter's own pytest."""

import importlib.util
import os
import sys
from pathlib import Path

from lowrank_sys.bench.device import tool
from lowrank_sys.bench.device.setting import Skipped

TESTS = Path(__file__).resolve().parents[2] / "tests"
LANE, TOY = ("gpu", "interpret"), ("gpu/test_int4.py",)  # in a dry run they are skipped by name


def run(setting):
    if not TESTS.is_dir():
        raise Skipped(f"no tests beside the package: {TESTS}")
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    workers = max(1, min(14, len(os.sched_getaffinity(0)) - 2))
    spread = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") and not setting.dry else []
    paths = [str(TESTS / name) for name in (TOY if setting.dry else LANE)]
    tool.expect(
        setting, [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), *spread, *paths]
    )
