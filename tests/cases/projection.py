"""Products with a basis, and the norms of channels."""

import torch

from cases.bounds import MAX, TINY, UNIT, Near, added, assert_within, exact, product, scaled
from cases.case import Case, exactly
from cases.draw import FLOATS
from lowrank_sys import reference
from lowrank_sys.reference.int8 import LEAST_SCALE, grouped
from lowrank_sys.reference.int8_gemm import CODES, GROUP, quantized


def low_rank(m, n, r, left):
    return (r, n) if left else (m, r)


def drawn_basis(draw, d, r):
    return draw.values(d, r, dtype=draw.of(*FLOATS))


def product_of(grad, basis, left):
    """R with its bound."""
    g, b = exact(grad), exact(basis)
    return product(Near(b.value.T, b.error.T), g) if left else product(g, b)


# A GEMM may multiply its factor, here 2.5e-4 or more, into X first, which loses digits where that is subnormal.
SUBNORMAL = TINY / 2.5e-4


def back_of(x, basis, left):
    """back(X) with its bound."""
    return _back(Near(x.value, x.error + SUBNORMAL * (x.value != 0)), exact(basis), left)


def _back(x, b, left):
    return product(b, x) if left else product(x, Near(b.value.T, b.error.T))


def int8_product(a, b):
    """A Bᵀ in INT8 with its bound: of a, a Near (p, d), any value within its error may be quantised; b is a tensor (q, d)."""
    codes, scale = quantized(b)
    grouped_b = (codes * scale.double()[..., None]).flatten(1)[:, : b.shape[1]]
    size = grouped(a.value.abs() + a.error, GROUP)
    most = size.amax(2) if size.numel() else size.new_zeros(size.shape[:2])
    # Half a code of the largest scale that a group may have; a group without a scale is zeros.
    half = (0.5001 * most / CODES + CODES * LEAST_SCALE).repeat_interleave(GROUP, 1)[:, : a.value.shape[1]]
    near = product(Near(a.value, a.error + half), exact(grouped_b.T))
    # The product of two scales may overflow beside codes that would cancel, or lose digits where it is subnormal.
    scales = most @ scale.double().T / CODES
    error = near.error + scale.shape[1] * GROUP * CODES**2 * TINY
    return Near(near.value, torch.where(scales < MAX / 2, error, torch.inf))


def int8_back_of(x, basis, left):
    """back(X) in INT8 with its bound; a bound of the transpose is one of the product."""
    if not left:
        return int8_product(x, basis)
    value, error = int8_product(Near(x.value.T, x.error.T), basis)
    return Near(value.T, error.T)


def sums_onto(param, rank):
    """Roundings of W's size in W + back(X): a BLAS begins the sums of a single row or column at W."""
    return rank if 1 in param.shape else 1


def added_back(param, low_rank, basis, *, alpha, beta, left):
    """beta W + alpha back(X) with its bound."""
    # A GEMM may multiply either operand by alpha first, which rounds subnormal entries.
    x, b = (Near(t.value, t.error + TINY / min(1.0, abs(alpha))) for t in (exact(low_rank), exact(basis)))
    param = param if beta else torch.zeros_like(param)  # as in BLAS, 0 * NaN is 0
    return added(scaled(beta, exact(param)), scaled(alpha, _back(x, b, left)), sums_onto(param, basis.shape[1]))


def project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(
        grad=draw.values(m, n, dtype=draw.of(*FLOATS)),
        basis=drawn_basis(draw, m if left else n, r),
        left=left,
        int8_gemm=draw.of(False, True),
    )


def compare_project(before, after, result):
    assert result.dtype == torch.float32 and result.is_contiguous()
    if before["int8_gemm"]:
        return exactly(reference.project)(before, after, result)
    assert_within("R", result, product_of(before["grad"], before["basis"], before["left"]))


def back_project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(
        param=draw.values(m, n, dtype=draw.of(*FLOATS)),
        low_rank=draw.values(*low_rank(m, n, r, left)),
        basis=drawn_basis(draw, m if left else n, r),
        alpha=draw.of(1.0, -0.25, 1e-3),
        beta=draw.of(1.0, 0.0, 0.5, -2.0),
        left=left,
        int8_gemm=draw.of(False, True),
    )


def compare_back_project(before, after, result):
    arguments = {name: value for name, value in before.items() if name != "int8_gemm"}
    if before["int8_gemm"]:
        return exactly(reference.back_project_)(before, after, result)
    assert_within("param", after["param"], added_back(**arguments))


def norms_arguments(draw):
    return dict(grad=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), left=draw.of(True, False))


def compare_norms(before, after, result):
    grad, axis = before["grad"].double(), 0 if before["left"] else 1
    squares = grad.square().sum(axis)
    error = (grad.shape[axis] + 2) * (UNIT * squares + TINY)
    norm = squares.sqrt()
    bound = torch.maximum((squares + error).sqrt() - norm, norm - (squares - error).clamp(min=0).sqrt()) + 2 * UNIT * norm
    assert_within("norms", result, Near(norm, torch.where(squares + error < MAX, bound, torch.inf)))


CASES = {
    "project": Case(project_arguments, compare_project),
    "back_project_": Case(back_project_arguments, compare_back_project),
    "channel_norms": Case(norms_arguments, compare_norms),
}
