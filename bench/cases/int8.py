"""INT8 weights: to codes and back, the update in place, and the linear layer on them."""

import contextlib

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, copy_of

GROUP, TOKENS = 256, 512


def _dense_inputs(case, randn):
    return {"weight": randn(case.m, case.n)}


def _weight_inputs(case, randn):
    codes, scale = reference.quantize_int8(randn(case.m, case.n, dtype=torch.float32))
    return {"codes": codes, "scale": scale}


def _update_inputs(case, randn):
    return _weight_inputs(case, randn) | {"update": randn(case.m, case.n)}


def _update(f, t, case):
    # Small enough that the same update fits the same scales over many calls.
    f(t["codes"], t["scale"], t["update"], alpha=-1e-4, decay=1.0, seed=1, step=0, parameter=0)
    return [t["codes"], t["scale"]]


def _linear_inputs(case, randn):
    return _weight_inputs(case, randn) | {"x": randn(TOKENS, case.n)}


def _backward_inputs(case, randn):
    return _weight_inputs(case, randn) | {"grad_out": randn(TOKENS, case.m)}


def _dense(codes, scale):
    return reference.int8.ungrouped(reference.int8.grouped(codes, GROUP) * scale[..., None], codes.shape[1])


def stored(case):
    """Bytes of codes and scales."""
    return case.matrix + 4 * case.m * -(-case.n // GROUP)


def update_bytes(case):
    """The update and the scales are read, the codes are read and written."""
    return case.element * case.matrix + case.matrix + stored(case)


def gemm(name, back):
    """The product with W in the type of x."""

    def base(t, case):
        rows, w = t[name], _dense(t["codes"].float(), t["scale"]).to(case.dtype)
        out = rows.new_empty(TOKENS, case.n if back else case.m)
        return (lambda: torch.mm(rows, w, out=out)) if back else (lambda: torch.mm(rows, w.T, out=out))

    return base


def dequantised(name, back):
    """The weight to the type of x, and then the product with it."""

    def base(t, case):
        rows, out = t[name], t[name].new_empty(TOKENS, case.n if back else case.m)

        def run():
            w = torch.ops.lowrank.dequantize_int8(t["codes"], t["scale"], dtype=case.dtype)
            torch.mm(rows, w if back else w.T, out=out)

        return run

    return base


@contextlib.contextmanager
def tokens(count):
    """Layers on `count` tokens inside."""
    global TOKENS
    usual, TOKENS = TOKENS, count
    try:
        yield
    finally:
        TOKENS = usual


def _convert_bytes(case):
    return case.element * case.matrix + stored(case)


def _product_bytes(case):
    return stored(case) + case.element * TOKENS * (case.m + case.n)


OPS = {
    "quantize_int8": Op(
        _dense_inputs,
        lambda f, t, c: list(f(t["weight"])),
        traffic=_convert_bytes,
        flop=lambda c: 2 * c.matrix,
        bases={"copy": copy_of(_convert_bytes)},
        overload="quantize_int8",
        oracle=reference.quantize_int8,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "dequantize_int8": Op(
        _weight_inputs,
        lambda f, t, c: [f(t["codes"], t["scale"], dtype=c.dtype)],
        traffic=_convert_bytes,
        flop=lambda c: c.matrix,
        bases={"copy": copy_of(_convert_bytes)},
        overload="dequantize_int8",
        oracle=reference.dequantize_int8,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "int8_update_": Op(
        _update_inputs,
        _update,
        traffic=update_bytes,
        flop=lambda c: 4 * c.matrix,
        bases={"copy": copy_of(update_bytes)},
        overload="int8_update_",
        oracle=reference.int8_update_,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "int8_linear": Op(
        _linear_inputs,
        lambda f, t, c: [f(t["x"], t["codes"], t["scale"])],
        traffic=_product_bytes,
        flop=lambda c: 2 * TOKENS * c.matrix,
        bases={"gemm": gemm("x", False), "dequantise-gemm": dequantised("x", False)},
        overload="int8_linear",
        oracle=reference.int8_linear,
        truth=lambda x, codes, scale: x @ _dense(codes, scale).T,
        ranked=False,
        sided=False,
    ),
    "int8_linear_backward": Op(
        _backward_inputs,
        lambda f, t, c: [f(t["grad_out"], t["codes"], t["scale"])],
        traffic=_product_bytes,
        flop=lambda c: 2 * TOKENS * c.matrix,
        bases={"gemm": gemm("grad_out", True), "dequantise-gemm": dequantised("grad_out", True)},
        overload="int8_linear_backward",
        oracle=reference.int8_linear_backward,
        truth=lambda dy, codes, scale: dy @ _dense(codes, scale),
        ranked=False,
        sided=False,
    ),
}
