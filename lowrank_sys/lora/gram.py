"""Solves with the Gram matrices BᵀB and A Aᵀ of factors, r x r, by their eigenvectors: singular ones too, as LoRA's B = 0 is."""

from typing import NamedTuple

import torch


class Gram(NamedTuple):
    """A symmetric matrix without negative eigenvalues: values (r,) and vectors (r, r)."""

    values: torch.Tensor
    vectors: torch.Tensor

    def inverse(self, damping=0.0):
        """(matrix + damping I)⁻¹; of what is singular in fp32 or fp64, the pseudo-inverse."""
        values = self.values + damping
        least = values.amax() * len(values) * torch.finfo(values.dtype).eps
        return self.vectors * torch.where(values > least, 1 / values, 0.0) @ self.vectors.T


def grams(factors):
    """`Gram` of each f fᵀ of matrices (r, d) of one rank, in one call of eigh."""
    values, vectors = torch.linalg.eigh(torch.stack([f @ f.T for f in factors]))
    return [Gram(*pair) for pair in zip(values.clamp(min=0), vectors)]


def sylvester(p, q, c):
    """X (r, r) of P X + X Q = C, P and Q as `Gram`; its part of the null space is 0."""
    sums = p.values[:, None] + q.values
    inside = p.vectors.T @ c @ q.vectors
    least = sums.amax() * len(sums) * torch.finfo(sums.dtype).eps
    return p.vectors @ torch.where(sums > least, inside / sums, 0.0) @ q.vectors.T
