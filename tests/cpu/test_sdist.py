"""The sdist and a wheel made from it: what is in them, and what is not."""

import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import lowrank_sys

ROOT = Path(__file__).parents[2]
PACKAGE = {
    f"lowrank_sys/{name}"
    for name in ("py.typed", "__init__.py", "kernels/step.py", "bench/cases/case.py", "optim/methods/galore.py")
}


def build(folder, kind, **environment):
    """What setuptools makes of the sources in `folder`."""
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}('.'))"
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(path, names) of the sdist of this tree; links and all, and nothing that was built."""
    folder = tmp_path_factory.mktemp("sources") / "tree"
    unwanted = shutil.ignore_patterns(
        "tests", "docs", "results", "build", "runs", "dist", "*.egg-info", "*.so", "_build.json", ".*", "__pycache__"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=unwanted)
    path = build(folder, "sdist")
    with tarfile.open(path) as archive:
        return path, {name.partition("/")[2] for name in archive.getnames()}


def test_an_sdist_has_all_that_a_build_reads(sdist):
    names = sdist[1]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert len(sources) > 80 and sources <= names
    assert PACKAGE | {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= names
    assert not any(name.endswith((".so", ".pyc", "_build.json")) for name in names)


def test_a_wheel_from_it_has_the_package_alone(sdist, tmp_path):
    with tarfile.open(sdist[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    wheel = build(folder, "wheel", LOWRANK_NATIVE="0", LOWRANK_CUDA="0")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        meta = f"lowrank_sys-{lowrank_sys.__version__}.dist-info"
        metadata = archive.read(f"{meta}/METADATA").decode()
    assert PACKAGE | {f"{meta}/licenses/LICENSE", "lowrank_sys/_build.json"} <= names
    assert f"\nVersion: {lowrank_sys.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert {name.split("/")[0] for name in names} == {"lowrank_sys", meta}
    assert not any(name.endswith((".cpp", ".h", ".cu", ".cuh", ".so", ".pyc")) for name in names)


@pytest.mark.parametrize("wish, cuda, version", [("1", "13.0", "+cu13"), ("1", None, ""), ("0", "13.0", ""), ("", "12.8", "")])
def test_a_build_that_must_have_cuda_is_labelled(monkeypatch, wish, cuda, version):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    label = runpy.run_path(str(ROOT / "setup.py"))["label"]
    monkeypatch.setitem(label.__globals__, "torch_package", lambda: (Path(), "2.14.1", cuda))
    monkeypatch.setenv("LOWRANK_CUDA", wish)
    assert label() == version


def test_no_compiler_is_found_where_there_is_no_program_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    find_compiler = runpy.run_path(str(ROOT / "setup.py"))["find_compiler"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_compiler() is None
