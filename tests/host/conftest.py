"""Counts which block algorithms ran on how many threads, and builds the executables of csrc/host/check."""

import inspect
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def counted(monkeypatch, count):
    """Calls of `_host`, whose first argument is the number of threads where a block runs."""
    host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

    def wrap(name, function):
        def call(*arguments, **options):
            if arguments and isinstance(arguments[0], int):
                count("block", name, arguments[0])
            return function(*arguments, **options)

        return call

    for name, function in vars(host).copy().items():
        if inspect.isbuiltin(function):
            monkeypatch.setattr(host, name, wrap(name, function))


class Check:
    """An executable, which a call runs with more of an environment."""

    def __init__(self, name, path):
        self.name, self._path = name, path

    def __call__(self, **environment):
        return subprocess.run([self._path], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="session")
def checks(request, tmp_path_factory):
    """Folder of the executables of all selected tests, built at once."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    asked = [item.callspec.params.get("check") for item in request.session.items if hasattr(item, "callspec")]
    targets = sorted({f"check_{name}" for name in asked if name})
    folder = tmp_path_factory.mktemp("checks")
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DLOWRANK_CHECKS=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", folder, "--parallel", "2", "--target", *targets]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def check(request, checks):
    """The executable of this name."""
    return Check(request.param, checks / f"check_{request.param}")
