"""Choosing a basis: exact SVD, and randomized subspace iteration (Halko, Martinsson and Tropp 2011, Algorithm 4.4).

The iteration has a fixed number of passes and no data-dependent branch, so that a GPU never waits for the host.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator
from lowrank_sys.subspace.shards import WHOLE

# Directions whose singular value is below FILL * sigma_1 are completed from the old basis and a seeded Gaussian.
FILL = 1e-5
# Share of the Gaussian in the completion: the old basis may already lie in the span of the new directions.
FRESH = 0.1
# Shift of each Cholesky pass, relative to the trace of the Gram matrix of unit columns; None is the dtype's epsilon. The
# third pass meets a Gram matrix within rounding of I: a shift there would only shorten the columns.
SHIFTS = (1e-6, None, 0.0)
# For columns that may depend on each other to within rounding: every shifted pass gains a factor of 30 to 80 in their condition.
DEPENDENT = (1e-6, None, None, None, 0.0)
# Share of the Gaussian in the warm columns of a sketch: first moments may have a rank below r.
MIX = 1e-2
# Orthogonal iterations on the small Gram matrix that pick the leading r of the sketched directions.
RITZ_ITERATIONS = 6
# Device types where LAPACK's QR and eigenvectors take less time than several Cholesky passes; on a GPU they make the host wait.
LAPACK = ("cpu",)


def dense_project(grad, basis, *, left):
    """project, as one product."""
    g = grad.to(accumulator(grad))
    return basis.to(g.dtype).T @ g if left else g @ basis.to(g.dtype)


def project(grad, basis, *, left):
    """project, by the op."""
    return torch.ops.lowrank.project(grad, basis, left=left)


def gaussian(rows, columns, seed, like):
    """Standard normal (rows, columns); depends on the seed and the device type alone."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=like.device, dtype=accumulator(like))


def unit_columns(y, shard=WHOLE):
    """Columns of y scaled to norm 1, zero columns kept. Divides by the maximum first: squares may overflow."""
    tiny = torch.finfo(y.dtype).tiny
    if shard.group:
        squares = torch.linalg.vector_norm(y, dim=0, dtype=torch.float64).square()
        return y / shard.sum(squares).sqrt().to(y.dtype).clamp(min=tiny)
    y = y / y.abs().amax().clamp(min=tiny)
    return y / torch.linalg.vector_norm(y, dim=0).clamp(min=tiny)


def cholesky_qr(y, passes, shifts=SHIFTS, shard=WHOLE):
    """Orthonormalize the columns of y (d, l) by shifted CholeskyQR (Fukaya et al. 2020): three passes for fp32 accuracy, five
    with DEPENDENT, one for a basis that is merely well conditioned. shard: that the rows of y are of."""
    y = unit_columns(y, shard)
    eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    for shift in shifts[:passes]:
        shift = torch.finfo(y.dtype).eps if shift is None else shift
        factor, _ = torch.linalg.cholesky_ex(shard.sum(y.T @ y) + shift * y.shape[1] * eye)
        y = y @ torch.linalg.solve_triangular(factor.mT, eye, upper=True)  # a GEMM instead of a solve with d right sides
    return y


def orthonormalize(y, passes, shard=WHOLE):
    """Orthonormal columns that span those of y (d, l), completed where y has no full rank, to fp32 accuracy; shard: that the rows
    of y are of, which are completed nowhere."""
    if y.device.type in LAPACK and not shard.group:
        return torch.linalg.qr(unit_columns(y)).Q.contiguous()
    return cholesky_qr(y, passes=passes, shard=shard)


def leading_eigenvectors(gram, rank):
    """(l, rank) orthonormal columns that span the leading eigenvectors of gram (l, l), largest first."""
    diagonal = gram.diagonal()
    gram = gram / diagonal.amax().clamp(min=torch.finfo(gram.dtype).tiny)
    if gram.device.type in LAPACK:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    v = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)[:, diagonal.argsort(descending=True)[:rank]]
    for i in range(RITZ_ITERATIONS):
        # a gram of low rank leaves columns that only their rounding tells apart
        v = cholesky_qr(gram @ v + FILL * v, passes=5 if i + 1 == RITZ_ITERATIONS else 1, shifts=DEPENDENT)
    return v


def canonical_signs(basis, old=None):
    """Flip columns until diag(oldᵀ basis) >= 0, or without `old` until each column's entry of largest magnitude is positive."""
    if old is None:
        pivot = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    else:
        pivot = (old.to(basis.dtype) * basis).sum(dim=0)
    return torch.where(pivot < 0, -basis, basis)


def svd_basis(grad, basis, *, rank, left, shard=WHOLE):
    """(the leading `rank` left (or right) singular vectors of G (m, n), as GaLore; the squares of their singular values).

    The old basis and zeros, if G is zero or not finite. shard: that the rows of G are of, on the right side: the vectors are then
    those of the sum of GᵀG (n, n) in fp64, which loses half of its digits and has twice those of fp32.
    """
    if shard.group:
        return _svd_basis_of_shards(grad, basis, rank, shard)
    _ops.subspace.check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=1, oversample=None, op="svd_basis")
    g = grad.to(accumulator(grad))
    valid = g.isfinite().all() & (g != 0).any()
    if not valid:
        old = basis if basis is not None else orthonormalize(gaussian(g.shape[0 if left else 1], rank, 0, g), passes=3)
        return old, g.new_zeros(rank)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return canonical_signs((u[:, :rank] if left else vh[:rank].T).contiguous(), basis), s[:rank].square()


def _svd_basis_of_shards(grad, basis, rank, shard):
    gram = shard.sum(grad.double().T @ grad.double())
    like = gram.new_empty(0, dtype=accumulator(grad))
    if not (gram.isfinite().all() and (gram != 0).any()):
        old = basis if basis is not None else orthonormalize(gaussian(len(gram), rank, 0, like), passes=3)
        return old, like.new_zeros(rank)
    energies, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, -rank:].flip(1).to(like.dtype).contiguous()
    return canonical_signs(leading, basis), energies[-rank:].flip(0).clamp(min=0).to(like.dtype)


def sketched_columns(rank, rows, columns, oversample=None):
    """How many directions of a (rows, columns) gradient are sketched for a basis of `rank`."""
    return min(rank + (max(8, -(-rank // 8)) if oversample is None else oversample), rows, columns)


def leading_directions(y, old, *, rank, seed):
    """The basis from y = G z (d, l), z with orthonormal columns: (B, energies) as subspace_iteration returns them.

    The eigenvectors of yᵀy are the Ritz vectors, at no further product with G.
    """
    size = y.abs().amax()
    valid = size.isfinite() & (size > 0)
    y = torch.where(valid, y / torch.where(valid, size, 1), 0)
    y = y @ leading_eigenvectors(y.T @ y, rank)
    norms = torch.linalg.vector_norm(y, dim=0)
    order = norms.argsort(descending=True, stable=True)
    y, norms = y[:, order], norms[order]

    fill = FRESH * unit_columns(gaussian(y.shape[0], rank, seed + 1, y))
    if old is not None:
        fill = old + fill
    new = orthonormalize(y / norms[0].clamp(min=torch.finfo(y.dtype).tiny) + FILL * fill, passes=3)
    new = canonical_signs(new, old)
    if old is not None:
        new = torch.where(valid, new, old)
    return new, torch.where(valid, norms * size, 0).square()


def seeded_basis(rows, rank, seed, like):
    """(rows, rank) orthonormal columns from the seed alone, fp32: the basis before there is any gradient."""
    return canonical_signs(orthonormalize(gaussian(rows, rank, seed, like), passes=3))


def sketch_directions(basis, exp_avg, *, other, left, seed=0, shard=WHOLE):
    """Omega (other, l) of the sketch Y = G Omega (right: Gᵀ Omega) that gives the basis after `basis` (d, r).

    Linear in G, so the sketches of micro-batches add up to the sketch of their sum. The span of the first moment
    (R's shape, or None) is the warm start: a power iteration from one refresh to the next; l - r columns, or all of them
    while the moment is zero, are Gaussian. In the basis's dtype, orthonormal up to its rounding.

    Args:
        other: length of the axis of G that is not projected.
        left: the basis projects from the left.
        seed: of the Gaussian.
        shard: that the rows of G are of, on the right side; `other` of them are here. So are Omega's rows, then.
    """
    if not shard.group:
        _ops.subspace.check_sketch_directions(basis, exp_avg, other=other, left=left)
    d, rank = basis.shape
    like, whole = basis.to(accumulator(basis)), shard.rows or other
    omega = shard.of(unit_columns(gaussian(whole, sketched_columns(rank, d, whole), seed, like)), other)
    if exp_avg is not None:
        warm = unit_columns(exp_avg.to(like.dtype).T if left else exp_avg.to(like.dtype), shard)
        omega[:, :rank] = warm + MIX * omega[:, :rank]
    return orthonormalize(omega, passes=3, shard=shard).to(basis.dtype)


def basis_from_sketch(sketch, old, *, left, seed=0):
    """(the next basis, its energies) from Y = G Omega (d, l), or Yᵀ (l, d) as project(Gᵀ...) gives it for a right basis; fp32.

    The old basis (d, r) and energies 0, if the sketch is zero or not finite.
    """
    y = sketch.to(accumulator(sketch))
    return leading_directions(y if left else y.T.contiguous(), old.to(y.dtype), rank=old.shape[1], seed=seed)


def subspace_iteration(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0, project=dense_project, shard=WHOLE):
    """Leading `rank` singular directions of G (m, n) on one side, and their energies.

    Args:
        grad: (m, n), fp32 | bf16 | fp16.
        basis: (m, r) if left, else (n, r): the old basis for a warm start (2 n_iter products with G), or None
            (2 n_iter + 1 products).
        rank: r, at most min(m, n).
        n_iter: power iterations with G Gᵀ; at least 1 with a basis.
        oversample: additional directions that are sketched and dropped; r/8 and at least 8 by default.
        seed: of the Gaussian sketch.
        project: computes the products with G.
        shard: that the rows of G are of, on the right side.

    Returns:
        (B, energies): B of the shape of `basis`, fp32, orthonormal columns with canonical signs; energies (r,), the squared
        Ritz values: at most sigma², close to it after two iterations. Directions in which G has no energy are completed. A
        gradient that is zero or not finite returns the old basis unchanged (without one, a seeded orthonormal basis) and
        energies 0.
    """
    if not shard.group:
        _ops.subspace.check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    d, other = grad.shape if left else (grad.shape[1], shard.rows or grad.shape[0])
    columns = sketched_columns(rank, d, other, oversample)
    old = None if basis is None else basis.to(accumulator(grad))

    def to_basis_side(z):
        y = shard.sum(project(grad, z, left=not left))
        return y if left else y.T.contiguous()

    def to_other_side(y):
        z = project(grad, y, left=left)
        return z.T.contiguous() if left else z

    if old is None:
        z = shard.of(orthonormalize(gaussian(other, columns, seed, grad), passes=2), len(grad))
        y = to_basis_side(z)
    else:
        y = old if columns == rank else torch.cat([old, unit_columns(gaussian(d, columns - rank, seed, grad))], dim=1)
    for i in range(n_iter):
        if i > 0 or old is None:
            y = cholesky_qr(y, passes=1)
        z = to_other_side(y)
        z = orthonormalize(z, passes=2, shard=shard) if i + 1 == n_iter else cholesky_qr(z, passes=1, shard=shard)
        y = to_basis_side(z)

    return leading_directions(y, old, rank=rank, seed=seed)
