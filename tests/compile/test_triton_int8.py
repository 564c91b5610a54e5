"""The INT8 linear layer fits every architecture: shared memory, registers, no spills, tensor cores."""

import re

import pytest

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.int8_linear import int8_linear_kernel

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORE = r"\b(HMMA|HGMMA|QMMA|UTC\w*MMA)"
# type of x, backward, sizes, group size: both directions of either width, an odd shape, and the smallest group.
CASES = [("bf16", False, "aligned", 256), ("fp16", True, "aligned", 256), ("fp32", False, "aligned", 256),
         ("fp32", True, "odd", 32)]


@pytest.fixture(scope="module")
def products(submit):
    return {(arch, case): submit(**arguments(arch, *case)) for arch in SHARED_KIB for case in CASES}


def arguments(arch, dtype, back, sizes, group):
    kind = "odd" if sizes == "odd" else 32 if dtype == "fp32" else 16
    config = dict(configs.INT8_LINEAR[kind])
    axis = "BLOCK_O" if back else "BLOCK_D"
    config[axis] = min(config[axis], group)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | configs.OPTIONS
    types = {"rows": f"*{dtype}", "codes": "*i8", "scale": "*fp32", "out": f"*{dtype}"} | dict.fromkeys(("t", "m", "n"), "i32")
    types |= {} if back else {"bias": "*fp32"}
    return {"module": int8_linear_kernel.__module__, "name": int8_linear_kernel.__name__, "types": types,
            "constants": {"BACK": back, "GROUP": group, "PRECISION": "tf32x3", **config}, "options": options, "arch": arch,
            "sizes": sizes}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_fits(arch, case, products):
    build = products[arch, case].result()
    assert build.shared <= SHARED_KIB[arch] * 1024
    assert build.registers * build.threads <= 65536
    assert build.stack == build.local == 0, "spills"
    assert re.search(TENSOR_CORE, build.sass), "no tensor-core instruction"
    if case[2] == "aligned":
        assert re.search(r"\bLDGSTS\.\S*128", build.sass), "operands are not copied 16 bytes at a time"
