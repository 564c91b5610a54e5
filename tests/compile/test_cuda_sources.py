"""csrc/cuda builds for every architecture with no GPU: no spills, and 16-byte loads where the data are aligned."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = re.findall(r'"(\d+)"', re.search(r"^CUDA_ARCHS = (.*)$", (ROOT / "setup.py").read_text(), re.M).group(1))
# Each source, and how many kernels it has at least.
SOURCES = {"adamw.cu": 9, "blockwise.cu": 21, "grass.cu": 9, "int4.cu": 4, "int8.cu": 18, "norms.cu": 9, "rows.cu": 9,
           "selection.cu": 3}
# Kernels of each source that must move 16 bytes at once: their names, how many there are, loads and stores of each.
WIDE = {
    "adamw.cu": [(r"5adamwI", 9, 4, 4)],  # every pair of dtypes
    "blockwise.cu": [(r"\d4adamI", 9, 2, 1), (r"13low_rank_adamI", 3, 2, 1), (r"8quantizeI", 6, 1, 0),
                     (r"10dequantizeI", 2, 0, 1), (r"\d4markE", 1, 2, 0)],
    "grass.cu": [(r"10grass_leftILi4", 9, 2, 2)],
    "int8.cu": [(r"(6update|8quantize)ILi8", 6, 1, 0)],
    "norms.cu": [(r"9row_normsILi8", 3, 1, 0)],  # the vector form
    "rows.cu": [(r"8add_rowsILi4", 3, 1, 0)],
}


def tool(name):
    """Path of an NVIDIA binary tool: on PATH, or bundled with Triton."""
    triton = pytest.importorskip("triton")
    return shutil.which(name, path=f"{Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'}:{os.environ['PATH']}")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Object file of each source, with code for every architecture."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    for source in SOURCES:
        run(nvcc, "-std=c++20", "-O3", "--fmad=false", "--threads", "2", "-Werror", "all-warnings", *targets, "-c",
            str(ROOT / "csrc" / "cuda" / source), "-o", str(folder / f"{source}.o"))
    return folder


def functions(text, pattern):
    """{function: its lines} of a cuobjdump listing."""
    pieces = re.split(pattern, text)
    return dict(zip(pieces[1::2], pieces[2::2]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(objects, source, arch):
    usage = run(tool("cuobjdump"), "-res-usage", "-arch", f"sm_{arch}", str(objects / f"{source}.o"))
    kernels = functions(usage, r"Function (\w+):")
    assert len(kernels) >= SOURCES[source]
    for name, line in kernels.items():
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
        assert used["STACK"] == used["LOCAL"] == 0, name
        # 256 threads of 128 registers still leave room for two blocks in a multiprocessor.
        assert used["REG"] <= 128, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", WIDE)
def test_wide_loads(objects, source, arch):
    sass = functions(run(tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", str(objects / f"{source}.o")), r"Function : (\w+)")
    for pattern, count, loads, stores in WIDE[source]:
        wide = {name: code for name, code in sass.items() if re.search(pattern, name)}
        assert len(wide) == count, pattern
        for name, code in wide.items():
            assert len(re.findall(r"LDG\.E[.\w]*\.128", code)) >= loads, name
            assert len(re.findall(r"STG\.E[.\w]*\.128", code)) >= stores, name


def test_int4_values_round_one_by_one(objects):
    """offset + scale * code is a product and a sum, for the same bits as on the CPU."""
    listing = run(tool("cuobjdump"), "-sass", "-arch", f"sm_{ARCHS[0]}", str(objects / "int4.cu.o"))
    code, = [code for name, code in functions(listing, r"Function : (\w+)").items() if "dequantize" in name]
    assert "FMUL" in code and "FADD" in code and not re.search(r"\bFFMA\b", code)


def test_sums_of_squares_round_one_by_one(objects):
    """No fused multiply-add before the square root, whose library code has some."""
    listing = run(tool("cuobjdump"), "-sass", "-arch", f"sm_{ARCHS[0]}", str(objects / "norms.cu.o"))
    for name, code in functions(listing, r"Function : (\w+)").items():
        assert "FADD" in code and not re.search(r"\bFFMA\b", code.partition("MUFU.RSQ")[0]), name
