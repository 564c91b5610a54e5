"""NF4 weights: to codes and back, and the linear layer on them."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases import int8
from lowrank_sys.bench.cases.case import Op, copy_of

GROUP = 64  # the default of the ops


def _inputs(case, randn):
    packed, absmax = reference.quantize_nf4(randn(case.m, case.n, dtype=torch.float32))
    return {"packed": packed, "absmax": absmax}


def _linear_inputs(case, randn):
    return _inputs(case, randn) | {"x": randn(int8.TOKENS, case.n)}


def _backward_inputs(case, randn):
    return _inputs(case, randn) | {"grad_out": randn(int8.TOKENS, case.m)}


def stored(case):
    """Bytes of codes and absmax."""
    return case.m * (-(-case.n // 2) + 4 * -(-case.n // GROUP))


def _convert_bytes(case):
    return case.element * case.matrix + stored(case)


def _product_bytes(case):
    return stored(case) + case.element * int8.TOKENS * (case.m + case.n)


def dequantised(name, back):
    """The weight to the type of x, and then the product with it."""

    def base(t, case):
        rows, out = t[name], t[name].new_empty(int8.TOKENS, case.n if back else case.m)

        def run():
            w = torch.ops.lowrank.dequantize_nf4(t["packed"], t["absmax"], n=case.n, dtype=case.dtype)
            torch.mm(rows, w if back else w.T, out=out)

        return run

    return base


OPS = {
    "quantize_nf4": Op(
        lambda case, randn: {"weight": randn(case.m, case.n)},
        lambda f, t, c: list(f(t["weight"])),
        traffic=_convert_bytes,
        flop=lambda c: 2 * c.matrix,
        bases={"copy": copy_of(_convert_bytes)},
        overload="quantize_nf4",
        oracle=reference.quantize_nf4,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "dequantize_nf4": Op(
        _inputs,
        lambda f, t, c: [f(t["packed"], t["absmax"], n=c.n, dtype=c.dtype)],
        traffic=_convert_bytes,
        flop=lambda c: c.matrix,
        bases={"copy": copy_of(_convert_bytes)},
        overload="dequantize_nf4",
        oracle=reference.dequantize_nf4,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "nf4_linear": Op(
        _linear_inputs,
        lambda f, t, c: [f(t["x"], t["packed"], t["absmax"])],
        traffic=_product_bytes,
        flop=lambda c: 2 * int8.TOKENS * c.matrix,
        bases={"dequantise-gemm": dequantised("x", False)},
        overload="nf4_linear",
        oracle=reference.nf4_linear,
        truth=lambda x, packed, absmax: reference.nf4_linear(x, packed, absmax.float()),
        ranked=False,
        sided=False,
    ),
    "nf4_linear_backward": Op(
        _backward_inputs,
        lambda f, t, c: [f(t["grad_out"], t["packed"], t["absmax"], n=c.n)],
        traffic=_product_bytes,
        flop=lambda c: 2 * int8.TOKENS * c.matrix,
        bases={"dequantise-gemm": dequantised("grad_out", True)},
        overload="nf4_linear_backward",
        oracle=reference.nf4_linear_backward,
        truth=lambda dy, packed, absmax, *, n: reference.nf4_linear_backward(dy, packed, absmax.float(), n=n),
        ranked=False,
        sided=False,
    ),
}
