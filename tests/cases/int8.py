"""INT8 weights: codes, scales and rounding to the bit, products within what fp32 may be off by."""

import torch

from cases.bounds import added, assert_within, exact, product
from cases.case import Case, exactly
from cases.draw import FLOATS
from lowrank_sys import reference


def quantized(draw, m, n, group_size):
    """Codes and scales, of hostile values or of any bytes."""
    codes, scale = reference.quantize_int8(draw.values(m, n), group_size=group_size)
    if draw.of(False, True):
        codes = (exact(draw.values(m, n, hostile=False)).value * 60).clamp(-128, 127).to(torch.int8)
        scale = draw.values(*scale.shape)
    return dict(codes=codes, scale=scale, group_size=group_size)


def weight(draw):
    return quantized(draw, draw.size(), draw.size(), draw.of(32, 64, 256, 1024))


def quantize_arguments(draw):
    return dict(weight=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), group_size=draw.of(32, 64, 256, 1024))


def dequantize_arguments(draw):
    return weight(draw) | dict(dtype=draw.of(None, *FLOATS))


def update_arguments(draw):
    args = weight(draw)
    return args | dict(
        update=draw.values(*args["codes"].shape, dtype=draw.of(*FLOATS)),
        alpha=draw.of(1.0, -0.25, 1e-3, 0.0),
        decay=draw.of(1.0, 0.99, 0.0, -2.0),
        seed=draw.integer(-(2**63), 2**63 - 1),
        step=draw.integer(0, 2**32 - 1),
        parameter=draw.integer(0, 2**32 - 1),
        offset=draw.of(0, 8, 1, 5, 2**35 - 16),
    )


def update_tensor_arguments(draw):
    args = update_arguments(draw)
    types = (torch.float32, torch.float64)
    numbers = {name: torch.tensor(args[name], dtype=draw.of(*types)) for name in ("alpha", "decay")}
    return args | numbers | dict(step=torch.tensor(args["step"], dtype=draw.of(torch.int64, torch.float64)))


def linear_arguments(draw):
    args = weight(draw)
    m, n = args["codes"].shape
    lead = draw.of((), (3,), (2, 2), (0,))
    bias = draw.of(None, draw.values(m, dtype=draw.of(*FLOATS)))
    return args | dict(x=draw.values(*lead, n, dtype=draw.of(*FLOATS)), bias=bias)


def backward_arguments(draw):
    args = weight(draw)
    return args | dict(grad_out=draw.values(*draw.of((), (3,), (2, 2), (0,)), len(args["codes"]), dtype=draw.of(*FLOATS)))


def dense_of(args):
    return exact(reference.dequantize_int8(args["codes"], args["scale"], group_size=args["group_size"]))


def flat(rows):
    return exact(rows.reshape(-1, rows.shape[-1]) if rows.numel() else rows.new_zeros(0, rows.shape[-1]))


def assert_rows(result, rows, near):
    want = rows.shape[:-1] + near.value.shape[1:]
    assert result.shape == want and result.dtype == rows.dtype and result.is_contiguous()
    if result.numel() and rows.shape[-1]:
        assert_within("result", result.reshape(near.value.shape), near)


def compare_linear(before, after, result):
    w = dense_of(before)
    near = product(flat(before["x"]), type(w)(w.value.T, w.error.T))
    assert_rows(result, before["x"], near if before["bias"] is None else added(near, exact(before["bias"])))


def compare_backward(before, after, result):
    assert_rows(result, before["grad_out"], product(flat(before["grad_out"]), dense_of(before)))


CASES = {
    "quantize_int8": Case(quantize_arguments, exactly(reference.quantize_int8)),
    "dequantize_int8": Case(dequantize_arguments, exactly(reference.dequantize_int8)),
    "int8_update_.tensor": Case(update_tensor_arguments, exactly(reference.int8_update_)),
    "int8_update_": Case(update_arguments, exactly(reference.int8_update_)),
    "int8_linear": Case(linear_arguments, compare_linear),
    "int8_linear_backward": Case(backward_arguments, compare_backward),
}
