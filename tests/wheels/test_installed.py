"""Each package of dist/ in a bare environment, run where no compiler is on PATH. `make test-wheels`.

LOWRANK_TORCH: what pip installs there as torch. LOWRANK_WHEEL_PYTHON: an environment that has torch and the extra `train` already,
in place of a new one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lowrank_sys

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
WHEELS, SDISTS = sorted(DIST.glob("*.whl")), sorted(DIST.glob("*.tar.gz"))
TRAIN = (
    "train",
    "--model",
    "llama-1m",
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--eval-tokens",
    "64",
    "--rank",
    "8",
)


def test_there_is_something_to_test():
    assert WHEELS or SDISTS, "dist/ is empty: make wheel, make wheel-cuda or make sdist"


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The interpreter of an environment with torch and what `lowrank train` imports, without this package."""
    if there := os.environ.get("LOWRANK_WHEEL_PYTHON"):
        yield there
        return
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "-q", "--no-compile"]
    wanted = re.search(r"^train = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    subprocess.run([*pip, os.environ.get("LOWRANK_TORCH", "torch>=2.11"), "numpy", "setuptools>=77"], check=True)
    subprocess.run([*pip, *re.findall(r'"(.+?)"', wanted)], check=True)
    yield str(folder / "bin" / "python")
    shutil.rmtree(folder)  # gigabytes, of which pytest would keep three


@pytest.fixture
def run(python, tmp_path):
    """run(arguments of python...) where PATH holds no program at all -> (stdout, stderr)."""
    empty = tmp_path / "no-programs"
    empty.mkdir()
    environment = {"PATH": str(empty), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def call(*arguments):
        done = subprocess.run([python, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, done.stderr

    return call


def install(run, package):
    run("-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", "--no-build-isolation", package)
    where, _ = run("-c", "import lowrank_sys; print(lowrank_sys.__file__)")
    assert "site-packages" in where
    return json.loads(run("-m", "lowrank_sys", "info", "--json")[0])


def trains(run, tmp_path):
    """stderr of a short run on a file of its own."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{i} low-rank gradients of a small corpus, line {i * i}" for i in range(400)))
    _, told = run("-m", "lowrank_sys", *TRAIN, "--data", "corpus.txt", "--out", "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["matrices_changed"][0] > 0
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    return told


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_what_a_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (meta,) = {name.split("/")[0] for name in names} - {"lowrank_sys"}
        metadata = archive.read(f"{meta}/METADATA").decode()
        binaries = [archive.read(name) for name in names if name.endswith(".so")]
    version, tags = wheel.name.split("-")[1], wheel.name.split("-")[2:]
    assert version.partition("+")[0] == lowrank_sys.__version__ and f"\nVersion: {version}\n" in metadata
    assert tags[:2] == ["cp310", "abi3"] and tags[2].startswith("manylinux")
    native = {"lowrank_sys/_C.abi3.so"} | ({"lowrank_sys/_cuda.abi3.so"} if "+cu" in version else set())
    assert {name for name in names if name.endswith(".so")} == native
    assert not [binary for binary in binaries if b"torch/lib" in binary]  # no path to the torch of the build
    assert {"lowrank_sys/py.typed", "lowrank_sys/_build.json", f"{meta}/licenses/LICENSE"} <= set(names)
    assert not [name for name in names if re.search(r"csrc|tests/|\.(cpp|cu|cuh|h|pyc)$", name)]


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_a_wheel_trains_where_there_is_no_compiler(wheel, run, tmp_path):
    facts = install(run, wheel)
    served = {row["op"]: row["implementation"] for row in facts["ops"] if row["device"] == "cpu"}
    assert set(served.values()) <= {"C++", "composition"} and served["step"] == "C++"
    assert "slow:" not in trains(run, tmp_path)


@pytest.mark.parametrize("sdist", SDISTS, ids=lambda path: path.name)
def test_an_sdist_installs_without_a_compiler_and_says_what_is_slow(sdist, run, tmp_path):
    facts = install(run, sdist)
    assert facts["native build"]["status"] == "none (no C++20 compiler found)"
    told = trains(run, tmp_path)
    (line,) = [line for line in told.splitlines() if line.startswith("slow:")]
    assert re.fullmatch(r"slow: plain PyTorch in place of kernels serves \d\d ops \(project, .*\): no C\+\+20 compiler found", line)
