"""CUDA C++ built for every architecture with no GPU, kernel by kernel."""

import functools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from lowrank_sys.bench.static import cards
from lowrank_sys.bench.static.build import TOOLS, Build, resources
from lowrank_sys.bench.static.cases import ARCHS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "csrc" / "cuda"
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--threads", "2", "-Werror", "all-warnings")


class Wide(NamedTuple):
    """Kernels that must move 16 bytes at a time: how many match a pattern of their mangled names, and the least number of
    16-byte loads and stores in each."""

    pattern: str
    kernels: int
    loads: int
    stores: int


# A source of csrc/cuda -> its kernels that move many bytes.
WIDE = {
    "adamw.cu": [Wide("5adamwI", 18, loads=4, stores=4)],
    "blockwise.cu": [
        Wide("4adamI", 18, loads=2, stores=1),
        Wide("13low_rank_adamIf", 1, loads=2, stores=1),
        Wide("13low_rank_adamIN", 2, loads=2, stores=0),
        Wide("8quantizeI", 6, loads=1, stores=0),
        Wide("10dequantizeI", 2, loads=0, stores=1),
        Wide("4markE", 1, loads=2, stores=0),
    ],
    "grass.cu": [Wide("10grass_leftILi4", 15, loads=2, stores=2)],
    "int4.cu": [],
    "int8.cu": [Wide("(6update|8quantize)ILi8", 6, loads=1, stores=0)],
    "nf4.cu": [Wide("8quantizeILi8", 3, loads=1, stores=0)],
    "norms.cu": [Wide("9row_normsILi8", 3, loads=1, stores=0), Wide("24column_tile_norms_kernel", 3, loads=8, stores=0)],
    "rounding.cu": [Wide("16round_stochasticILi8", 3, loads=2, stores=1)],
    "rows.cu": [Wide("8add_rowsILi4", 3, loads=1, stores=0)],
    "selection.cu": [],
}


def names():
    """Every source; none in an install without csrc."""
    return sorted(path.name for path in FOLDER.glob("*.cu"))


def tool(name):
    """Path of an NVIDIA binary tool: bundled with Triton, or on PATH."""
    return shutil.which(name, path=f"{TOOLS}:{os.environ['PATH']}")


def compiler():
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


def run(*command):
    """Standard output; raises with everything that a failing command said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_source(name, folder, archs=ARCHS):
    """Build a source for these architectures; returns the object file. Warnings are errors."""
    target = Path(folder) / f"{name}.o"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    run(compiler(), *FLAGS, *targets, "-c", FOLDER / name, "-o", target)
    return target


def _functions(text, pattern):
    """{function: its lines} of a cuobjdump listing."""
    pieces = re.split(pattern, text)
    return dict(zip(pieces[1::2], pieces[2::2]))


@functools.cache
def kernels(target, arch):
    """{mangled name: Build} of an object file on one architecture."""
    usage = _functions(run(tool("cuobjdump"), "-res-usage", "-arch", f"sm_{arch}", target), r"Function (\w+):")
    sass = _functions(run(tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", target), r"Function : (\w+)")
    threads = bounds(target, arch)
    builds = {}
    for name, line in usage.items():
        used = resources(line)
        shared = used["SHARED"] - (cards.RESERVED if arch >= 90 else 0)  # there the listing counts what the system takes
        builds[name] = Build(shared, threads.get(name, 256), used["REG"], used["STACK"], used["LOCAL"], sass[name])
    return builds


def bounds(target, arch):
    """{mangled name: the threads of a block, by its __launch_bounds__}."""
    sections = _functions(run(tool("cuobjdump"), "-elf", "-arch", f"sm_{arch}", target), r"\.nv\.info\.(\w+)\n")
    found = {
        name: re.search(r"EIATTR_MAX_THREADS\s.*?Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", text, re.S) for name, text in sections.items()
    }
    return {name: math.prod(int(size, 16) for size in match.groups()) for name, match in found.items() if match}


def readable(name):
    """A mangled name as its function and template arguments."""
    tool = shutil.which("c++filt")
    text = run(tool, name).strip() if tool else name
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]
    return re.sub(r"\b(lowrank|portable)::", "", text)
