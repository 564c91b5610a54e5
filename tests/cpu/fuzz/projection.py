"""Products with a basis, and the norms of channels."""

import torch

from fuzz.bounds import MAX, TINY, UNIT, Near, added, assert_within, exact, product, scaled
from fuzz.harness import FLOATS, Fuzz


def low_rank(m, n, r, left):
    return (r, n) if left else (m, r)


def drawn_basis(draw, d, r):
    return draw.values(d, r, dtype=draw.of(*FLOATS))


def product_of(grad, basis, left):
    """R with its bound."""
    g, b = exact(grad), exact(basis)
    return product(Near(b.value.T, b.error.T), g) if left else product(g, b)


def back_of(x, basis, left):
    """back(X) with its bound."""
    return _back(x, exact(basis), left)


def _back(x, b, left):
    return product(b, x) if left else product(x, Near(b.value.T, b.error.T))


def added_back(param, low_rank, basis, *, alpha, beta, left):
    """beta W + alpha back(X) with its bound."""
    # A GEMM may multiply either operand by alpha first, which rounds subnormal entries.
    x, b = (Near(t.value, t.error + TINY / min(1.0, abs(alpha))) for t in (exact(low_rank), exact(basis)))
    param = param if beta else torch.zeros_like(param)  # as in BLAS, 0 * NaN is 0
    return added(scaled(beta, exact(param)), scaled(alpha, _back(x, b, left)))


def project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(grad=draw.values(m, n, dtype=draw.of(*FLOATS)), basis=drawn_basis(draw, m if left else n, r), left=left)


def compare_project(before, after, result):
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert_within("R", result, product_of(**before))


def back_project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(param=draw.values(m, n, dtype=draw.of(*FLOATS)), low_rank=draw.values(*low_rank(m, n, r, left)),
                basis=drawn_basis(draw, m if left else n, r), alpha=draw.of(1.0, -0.25, 1e-3),
                beta=draw.of(1.0, 0.0, 0.5, -2.0), left=left)


def compare_back_project(before, after, result):
    assert_within("param", after["param"], added_back(**before))


def norms_arguments(draw):
    return dict(grad=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), left=draw.of(True, False))


def compare_norms(before, after, result):
    grad, axis = before["grad"].double(), 0 if before["left"] else 1
    squares = grad.square().sum(axis)
    error = (grad.shape[axis] + 2) * (UNIT * squares + TINY)
    norm = squares.sqrt()
    bound = torch.maximum((squares + error).sqrt() - norm, norm - (squares - error).clamp(min=0).sqrt()) + 2 * UNIT * norm
    assert_within("norms", result, Near(norm, torch.where(squares + error < MAX, bound, torch.inf)))


FUZZ = {
    "project": Fuzz(project_arguments, compare_project),
    "back_project_": Fuzz(back_project_arguments, compare_back_project),
    "channel_norms": Fuzz(norms_arguments, compare_norms),
}
