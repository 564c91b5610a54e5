"""Bases in INT4: codes are the oracle's, products are those of the dequantized basis."""

import torch

from cases.bounds import assert_within
from cases.case import Case, exactly
from cases.draw import FLOATS
from cases.projection import added_back, low_rank, product_of
from lowrank_sys.reference import int4 as reference


def group_size(draw):
    return draw.of(32, 256, 64, 1024)


def quantize_arguments(draw):
    return dict(basis=draw.values(draw.size(), draw.size(1, 65), dtype=draw.of(*FLOATS)), group_size=group_size(draw))


def drawn_int4(draw, d, r, size=None):
    """Any bytes, with scales and offsets that no quantizer need have made, in groups of `size`."""
    size = size or group_size(draw)
    groups = -(-d // size)
    return dict(
        packed=draw.values(r, (d + 1) // 2, hostile=False).mul(100).to(torch.int32).to(torch.uint8),
        scale=draw.values(r, groups),
        offset=draw.values(r, groups),
        group_size=size,
    )


def dequantize_arguments(draw):
    d = draw.size()
    return dict(d=d, **drawn_int4(draw, d, draw.size(1, 65)))


def project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(grad=draw.values(m, n, dtype=draw.of(*FLOATS)), **drawn_int4(draw, m if left else n, r), left=left)


def values_of(arguments, matrix):
    d = arguments[matrix].shape[0 if arguments["left"] else 1]
    return reference.dequantize_int4(
        arguments["packed"], arguments["scale"], arguments["offset"], d=d, group_size=arguments["group_size"]
    )


def compare_project(before, after, result):
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert_within("R", result, product_of(before["grad"], values_of(before, "grad"), before["left"]))


def back_project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(
        param=draw.values(m, n, dtype=draw.of(*FLOATS)),
        low_rank=draw.values(*low_rank(m, n, r, left)),
        **drawn_int4(draw, m if left else n, r),
        alpha=draw.of(1.0, -0.25, 1e-3),
        beta=draw.of(1.0, 0.0, 0.5, -2.0),
        left=left,
    )


def compare_back_project(before, after, result):
    rest = {name: before[name] for name in ("alpha", "beta", "left")}
    assert_within("param", after["param"], added_back(before["param"], before["low_rank"], values_of(before, "param"), **rest))


CASES = {
    "quantize_int4": Case(quantize_arguments, exactly(reference.quantize_int4)),
    "dequantize_int4": Case(dequantize_arguments, exactly(reference.dequantize_int4)),
    "project_int4": Case(project_arguments, compare_project),
    "back_project_int4_": Case(back_project_arguments, compare_back_project),
}
