"""The ops themselves under the address sanitizer: random calls never read or write outside of a tensor."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 6  # an op and test: a call takes several times as long here

pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("g++") and sys.platform == "linux"), reason="needs cmake and g++ on Linux"
    ),
    pytest.mark.full,
]


def library(name):
    """Path of a library of g++; a bare name if g++ does not have it."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def build():
    """Folder of the sanitized build; what did not change is not built again."""
    if not Path(library("libasan.so")).is_absolute():
        pytest.skip("g++ has no libasan")
    folder = ROOT / "build" / "asan"
    options = {
        "CMAKE_CXX_COMPILER": "g++",
        "LOWRANK_OPS": "ON",
        "LOWRANK_SANITIZE": "ON",
        "LOWRANK_OUTPUT": folder / "package",
        "LOWRANK_TORCH": Path(torch.__file__).parent,
        "LOWRANK_PYTHON_INCLUDE": sysconfig.get_path("include"),
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *definitions], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", folder, "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def package(build, tmp_path):
    """A folder for sys.path: lowrank_sys with the sanitized module in place of its own."""
    copy = tmp_path / "lowrank_sys"
    copy.mkdir()
    for path in (ROOT / "lowrank_sys").iterdir():
        if path.suffix != ".so" and path.name not in ("_build.json", "__pycache__"):
            (copy / path.name).symlink_to(path)
    for path in (build / "package").iterdir():
        (copy / path.name).symlink_to(path)
    return tmp_path


def python(code, *arguments, **environment):
    """Run Python code with the sanitizer loaded first. libstdc++ too: it must be there when the sanitizer looks for throw."""
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_random_calls(package, count):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lowrank_sys._C as module, pytest; assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/cpu/test_fuzz.py', '-k', 'not reference']))"
    )
    done = python(code, package, LOWRANK_FUZZ=str(EXAMPLES))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    count("sanitizer", "address of every op")


def test_an_overrun_is_seen(build):
    """A write just past a tensor, by a library of the same build."""
    code = (
        "import ctypes, sys, torch; values = torch.zeros(10); f = ctypes.CDLL(sys.argv[1]).overrun\n"
        "f.argtypes = [ctypes.c_void_p, ctypes.c_int64]; f(values.data_ptr(), int(sys.argv[2]))"
    )
    inside, outside = (python(code, build / "liboverrun.so", place) for place in (9, 10))
    assert inside.returncode == 0, inside.stderr[-3000:]
    assert outside.returncode != 0 and "heap-buffer-overflow" in outside.stderr and "in overrun" in outside.stderr
