"""Every kernel and configuration fits every architecture: shared memory, registers, no spills, tensor cores in the products.

By default each configuration is built once per architecture, in variants (side, types, arguments, sizes) chosen to cover all
pairs, and the step at r = 128 on both sides, with a basis in INT4 too. LOWRANK_COMPILE=all builds the full product (hours).
"""

import itertools
import os
import re
from typing import NamedTuple

import pytest

from lowrank_sys.kernels import adam, back_project, configs, project

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}
ANY_TENSOR_CORE = r"\b(HMMA|HGMMA|QMMA|UTC\w*MMA)"

SIZES = dict.fromkeys(("m", "n", "r", "width", "splits", "chunk", "channels"), "i32")
HYPER = dict.fromkeys(("beta1", "beta2", "gain1", "gain2", "eps"), "fp32")
MOMENTS = dict.fromkeys(("exp_avg", "exp_avg_sq", "scalars"), "*fp32")
# Arguments of which a launch takes one a matrix.
EACH = ("grad", "basis", "scale", "offset", "out", "exp_avg", "exp_avg_sq", "low_rank", "param", "low_rank_grad")
KERNELS = {"project": project.project_kernel, "back_project": back_project.back_project_kernel, "adam": adam.adam_kernel}

FLOATS = ("fp32", "bf16", "fp16")
SAME = [("bf16", "bf16"), ("fp16", "fp16")]
MIXED = [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"), ("bf16", "fp16")]


class Row(NamedTuple):
    """One configuration of the table."""

    kernel: str
    kind: object
    rank: int


class Case(NamedTuple):
    arch: int
    row: Row
    left: bool
    types: tuple
    variant: str
    sizes: str
    precision: str
    together: int  # matrices that share the launch

    @property
    def kernel(self):
        return self.row.kernel

    @property
    def config(self):
        return configs.ADAM if self.kernel == "adam" else configs.TABLES[self.arch][self.row[:2]][self.row.rank]

    def __str__(self):
        side = "left" if self.left else "right"
        row = f"{self.kernel}-{self.row.kind}-r{self.row.rank}"
        types = "-".join(self.types)
        return f"sm_{self.arch}-{row}-{side}-{types}-{self.variant}-{self.sizes}-{self.precision}-{self.together}"

    def arguments(self):
        """Arguments of `compile_triton`."""
        names = KERNELS[self.kernel].arg_names
        types = [f"*{name}" for name in self.types]
        if self.kernel == "project":
            # The update has the basis' type; R itself is fp32.
            stepping, split = "step" in self.variant, "split" in self.variant
            runtime = {"grad": types[0], "basis": types[1], "out": types[1] if stepping else "*fp32"}
            runtime |= MOMENTS if stepping else {}
            runtime |= {"partials": "*fp32", "counters": "*i32"} if split else {}
        elif self.kernel == "back_project":
            runtime = dict(zip(("low_rank", "basis", "param"), types)) | {"scalars": "*fp32"}
            runtime |= {"skipped": "*i64"} if "counted" in self.variant else {}
        else:
            runtime = {"low_rank_grad": "*fp32", "out": types[0]} | MOMENTS
        int4 = "int4" in self.variant
        runtime |= {"basis": "*u8", "scale": "*fp32", "offset": "*fp32"} if int4 else {}
        runtime |= {name: type_ for name, type_ in (SIZES | HYPER).items() if name in names}
        runtime |= {name: (runtime[name],) * self.together for name in EACH if name in runtime}
        config = dict(self.config)
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | configs.OPTIONS
        constants = {"LEFT": self.left, "STEP": "step" in self.variant, "PRECISION": self.precision,
                     "GROUP": 256 if int4 else 0, **config}
        kernel = KERNELS[self.kernel]
        return {"module": kernel.__module__, "name": kernel.__name__, "types": runtime, "constants": constants,
                "options": options, "arch": self.arch, "sizes": self.sizes}


def variants(arch, row):
    """Everything the launchers make of one configuration."""
    if row.kernel == "adam":
        calls = [((out,), "step") for out in FLOATS]
    elif row.kernel == "project":
        types = {16: SAME, 32: MIXED, "odd": SAME + MIXED}[row.kind]
        calls = list(itertools.product(types, ("step", "step+split", "plain", "plain+split")))
        # An INT4 basis counts as fp32.
        calls += [(pair, f"{variant}+int4") for pair, variant in calls if pair[1] == "fp32"]
    else:
        # A step's update has the basis' type; `back_project_` brings fp32.
        types = list(itertools.product(FLOATS, FLOATS))
        steps = [((basis, basis, param), variant) for basis, param in types for variant in ("step", "step+counted")]
        plain = [(("fp32", basis, param), "plain") for basis, param in types]
        plain += [(types, f"{variant}+int4") for types, variant in steps + plain if types[:2] == ("fp32", "fp32")]
        narrow = [call for call in steps if "fp32" not in call[0]]
        calls = {16: narrow, 32: [call for call in steps + plain if call not in narrow], "odd": steps + plain}[row.kind]
    sizes = {"odd": ("odd", "ones"), "any": ("aligned", "odd", "ones")}.get(row.kind, ("aligned", "row"))
    precisions = ["tf32x3", "tf32"] if row.kind in (32, "odd") else ["tf32x3"]
    return [Case(arch, row, left, *call, size, precision, together)
            for left, call, size, precision in itertools.product((True, False), calls, sizes, precisions)
            for together in ((1, configs.MOST) if "step" in call[1] else (1,))]


def the_step(arch, row):
    """Both kernels of a step at r = 128 with every argument given, in one type: left alone, right eight together."""
    if row.rank != 128 or row.kind not in (16, 32):
        return []
    types = ("bf16" if row.kind == 16 else "fp32",) * (2 if row.kernel == "project" else 3)
    variants = ["step+split" if row.kernel == "project" else "step+counted"]
    variants += [f"{variants[0]}+int4"] if row.kind == 32 else []
    return [Case(arch, row, left, types, variant, "aligned", "tf32x3", together)
            for variant in variants for left, together in ((True, 1), (False, configs.MOST))]


def pairs(case):
    fields = [(name, getattr(case, name)) for name in ("arch", "row", "left", "types", "variant", "sizes", "precision",
                                                            "together")]
    return set(itertools.combinations(fields, 2))


def selected():
    """Cases to build: everything, or the step and a greedy cover of pairs with one variant a configuration."""
    rows = [Row(kernel, kind, rank) for (kernel, kind), ranks in configs.TABLES[80].items() for rank in ranks]
    product = [(arch, row) for arch in configs.TABLES for row in [*rows, Row("adam", "any", 0)]]
    if os.environ.get("LOWRANK_COMPILE") == "all":
        return [case for group in product for case in variants(*group)]
    cases = [case for group in product for case in the_step(*group)]
    covered = set().union(*map(pairs, cases))
    for group in product:
        if not the_step(*group):
            best = max(variants(*group), key=lambda case: len(pairs(case) - covered))
            covered |= pairs(best)
            cases.append(best)
    return cases


@pytest.mark.parametrize("case", selected(), ids=str)
def test_fits(case, builds, proven):
    build = builds[case].result()
    assert build.shared <= SHARED_KIB[case.arch] * 1024
    assert build.registers * build.threads <= 65536
    assert build.stack == build.local == 0, "spills"
    if case.kernel != "adam":
        assert re.search(ANY_TENSOR_CORE, build.sass), "no tensor-core instruction"
        if case in the_step(case.arch, case.row):
            assert re.search(TENSOR_CORES.get(case.arch, ANY_TENSOR_CORE), build.sass), "not this architecture's tensor cores"
            assert re.search(r"\bLDGSTS\.\S*128", build.sass), "operands are not copied 16 bytes at a time"
            assert re.search(r"\bSTG\.E\S*\.128", build.sass), "results are not stored 16 bytes at a time"
    proven.append((case, build))


def test_spills_are_seen(submit):
    """A tile far too large for its registers is reported as such: the reading of resources works."""
    case = the_step(80, Row("back_project", 32, 128))[0]
    arguments = case.arguments()
    arguments["options"]["num_warps"] = 4
    arguments["constants"] |= {"BLOCK_M": 128, "BLOCK_N": 256}
    assert submit(**arguments).result().stack > 0
