"""Bases in INT4. They are compared with what an fp32 basis takes: a copy of it, and the fp32 GEMMs."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, low_rank, orthonormal, product, product_back

GROUP = 256
NAMES = ("packed", "scale", "offset")


def int4_bytes(case):
    """Half a byte an entry, and two fp32 numbers a group."""
    d = case.m if case.left else case.n
    return case.rank * (-(-d // 2) + 8 * -(-d // GROUP))


def int4_basis(case, randn):
    """A basis in INT4, and what its entries are, for the bare GEMMs."""
    int4 = torch.ops.lowrank.quantize_int4(orthonormal(case, randn), group_size=GROUP)
    basis = torch.ops.lowrank.dequantize_int4(*int4, d=case.m if case.left else case.n, group_size=GROUP)
    return dict(zip(NAMES, int4)) | {"basis": basis.to(case.dtype)}


def _back_project(f, t, case):
    # beta < 1 keeps the weights bounded over many calls.
    f(t["param"], t["low_rank"], *(t[name] for name in NAMES), alpha=0.25, beta=0.99, left=case.left)
    return [t["param"]]


def _in_fp64(function):
    """`function` of reference.galore on fp64 tensors, with the basis that doubles of packed, scale and offset stand for."""

    def truth(*args, left, **rest):
        *tensors, packed, scale, offset = args
        d = tensors[0].shape[0 if left else 1]
        basis = reference.dequantize_int4(packed.to(torch.uint8), scale.float(), offset.float(), d=d, group_size=GROUP)
        return function(*tensors, basis.double(), left=left, **rest)

    return truth


def _copy(t, case):
    out = torch.empty_like(t["basis"], dtype=torch.float32)
    return lambda: out.copy_(t["basis"])


OPS = {
    "quantize_int4": Op(
        lambda c, randn: {"basis": orthonormal(c, randn)},
        lambda f, t, c: list(f(t["basis"], group_size=GROUP)),
        traffic=lambda c: c.element * c.basis + int4_bytes(c),
        flop=lambda c: 2 * c.basis,
        bases={"copy": _copy},
        overload="quantize_int4",
        oracle=reference.quantize_int4,
        exact=True,
    ),
    "dequantize_int4": Op(
        int4_basis,
        lambda f, t, c: [f(*(t[name] for name in NAMES), d=c.m if c.left else c.n, group_size=GROUP)],
        traffic=lambda c: 4 * c.basis + int4_bytes(c),
        flop=lambda c: 2 * c.basis,
        bases={"copy": _copy},
        overload="dequantize_int4",
        oracle=reference.dequantize_int4,
        exact=True,
    ),
    "project_int4": Op(
        lambda c, randn: {"grad": randn(c.m, c.n)} | int4_basis(c, randn),
        lambda f, t, c: [f(t["grad"], *(t[name] for name in NAMES), left=c.left)],
        traffic=lambda c: c.element * c.matrix + int4_bytes(c) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product},
        overload="project_int4",
        oracle=reference.project_int4,
        truth=_in_fp64(reference.project),
    ),
    "back_project_int4_": Op(
        lambda c, randn: {"param": randn(c.m, c.n), "low_rank": randn(*low_rank(c), dtype=torch.float32), **int4_basis(c, randn)},
        _back_project,
        traffic=lambda c: 2 * c.element * c.matrix + int4_bytes(c) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="back_project_int4_",
        oracle=reference.back_project_int4_,
        truth=_in_fp64(reference.back_project_),
    ),
}
