"""An install has every file of the package, and imports."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]


def sources(folder):
    """Python files under `folder`, links followed."""
    return {
        str(Path(parent, name).relative_to(folder))
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def test_an_install_has_every_module_and_imports(tmp_path):
    """A package left out of pyproject.toml still works in the source tree, and only there."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    assert sources(tmp_path / "lowrank_sys") == sources(ROOT / "lowrank_sys")
    code = (
        "import lowrank_sys, lowrank_sys.optim, lowrank_sys.bench.command, lowrank_sys.train.command, sys\n"
        "assert lowrank_sys.__file__.startswith(sys.argv[1]), lowrank_sys.__file__"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def cuda_archs(monkeypatch, tmp_path):
    """setup.py's cuda_archs with an nvcc that knows compute_75 to compute_103; an argument is LOWRANK_CUDA_ARCHS."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' 75 80 86 90 100 103\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    function = runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]

    def call(wish):
        monkeypatch.setenv("LOWRANK_CUDA_ARCHS", wish)
        return function(str(nvcc))

    return call


def test_cuda_archs_are_the_asked_for_or_the_usual_ones_that_nvcc_knows(cuda_archs):
    assert cuda_archs("") == ["80", "86", "90", "100"]
    assert cuda_archs("90") == ["90"]
    assert cuda_archs("103;90;80;90") == ["80", "90", "103"]


@pytest.mark.parametrize("wish", ["75", "120", "sm_90", "9.0", "80,90", "80;", "all"])
def test_bad_cuda_archs_are_one_line(cuda_archs, wish):
    with pytest.raises(SystemExit) as stop:
        cuda_archs(wish)
    assert str(stop.value) == (
        "lowrank: LOWRANK_CUDA_ARCHS must be compute capabilities such as '90' or '80;90', "
        f"got {wish!r}; valid: 80, 86, 90, 100, 103"
    )
