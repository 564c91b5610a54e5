"""csrc/cuda builds for every architecture with no GPU: no spills, and 16-byte accesses where the data are aligned.

Without --full for the H100 alone.
"""

import concurrent.futures
import re

import pytest

pytest.importorskip("triton")

from lowrank_sys.bench.static import sources
from lowrank_sys.bench.static.cases import ARCHS

USUAL = 90
EVERY_ARCH = pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.full] * (a != USUAL)) for a in ARCHS])
EVERY_SOURCE = pytest.mark.parametrize("source", sources.names())


@pytest.fixture(scope="module")
def objects(request, tmp_path_factory):
    """Object file of each source, with code for every architecture that a selected test asks for."""
    if sources.compiler() is None:
        pytest.skip("nvcc is not installed")
    items = [item for item in request.session.items if "objects" in getattr(item, "fixturenames", ())]
    archs = sorted({item.callspec.params["arch"] for item in items if hasattr(item, "callspec")} | {USUAL})
    folder = tmp_path_factory.mktemp("cuda")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each waits for an nvcc of its own
        return dict(zip(sources.names(), pool.map(lambda name: sources.compile_source(name, folder, archs), sources.names())))


def test_every_source_says_which_kernels_move_wide():
    assert set(sources.names()) == sources.WIDE.keys()


def test_the_architectures_are_those_of_the_build():
    listed = re.search(r"^CUDA_ARCHS = (.*)$", (sources.ROOT / "setup.py").read_text(), re.M).group(1)
    assert ARCHS == tuple(map(int, re.findall(r'"(\d+)"', listed)))


@EVERY_ARCH
@EVERY_SOURCE
def test_fits(objects, source, arch, proven):
    kernels = sources.kernels(objects[source], arch)
    assert kernels
    for name, build in kernels.items():
        assert build.stack == build.local == 0, name
        # 256 threads of 128 registers still leave room for two blocks in a multiprocessor.
        assert build.registers <= 128, name
        proven["cuda"].append((sources.readable(name).partition("<")[0], name, arch, build))


@EVERY_ARCH
@EVERY_SOURCE
def test_wide_accesses(objects, source, arch):
    kernels = sources.kernels(objects[source], arch)
    for wide in sources.WIDE[source]:
        found = {name: build for name, build in kernels.items() if re.search(wide.pattern, name)}
        assert len(found) == wide.kernels
        for name, build in found.items():
            assert build.wide("LDG") >= wide.loads and build.wide("STG") >= wide.stores, name


def test_int4_values_round_one_by_one(objects):
    """offset + scale * code is a product and a sum, for the same bits as on the CPU."""
    (build,) = (build for name, build in sources.kernels(objects["int4.cu"], USUAL).items() if "dequantize" in name)
    assert "FMUL" in build.sass and "FADD" in build.sass and not re.search(r"\bFFMA\b", build.sass)


def test_sums_of_squares_round_one_by_one(objects):
    """No fused multiply-add before the square root, whose library code has some."""
    for name, build in sources.kernels(objects["norms.cu"], USUAL).items():
        assert "FADD" in build.sass and not re.search(r"\bFFMA\b", build.sass.partition("MUFU.RSQ")[0]), name
