"""Newton-Schulz orthogonalization as Muon does it (Jordan et al. 2024)."""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.adam import accumulator

# Rows of a symmetric product that are computed at once: blocks above the diagonal are copies.
BLOCK = 256


def gram_into(out, x, across):
    """out <- x xᵀ, or xᵀ x if across: block rows up to the diagonal, then their transposes."""
    rows = x.T if across else x
    size = rows.shape[0]
    if size < 2 * BLOCK or x.device.type != "cpu":
        return torch.mm(rows, rows.T, out=out)
    return _symmetric_(out, lambda i, j: torch.mm(rows[i:j], rows[:j].T, out=out[i:j, :j]))


def _symmetric_(out, lower):
    """Fill `out` from lower(i, j), which writes the rows i ... j - 1 up to column j."""
    size = out.shape[0]
    for i in range(0, size, BLOCK):
        j = min(i + BLOCK, size)
        lower(i, j)
        out[:i, i:j] = out[i:j, :i].T
    return out


def polynomial_into(out, gram, a, b, c):
    """out <- a I + b A + c A A for a symmetric A."""
    if gram.shape[0] < 2 * BLOCK or gram.device.type != "cpu":
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=out)
    else:
        _symmetric_(out, lambda i, j: torch.addmm(gram[i:j, :j], gram[i:j], gram[:, :j], beta=b, alpha=c, out=out[i:j, :j]))
    out.diagonal().add_(a)
    return out


def newton_schulz(x, *, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """Move all singular values of x (m, n) towards 1: X <- (a I + b A + c A A) X with A = X Xᵀ, from X = x / |x|_F.

    With the published coefficients five steps bring singular values from 0.01 |x|_F on into about [0.7, 1.2]; they oscillate
    around 1 by design. A tall x is iterated on its short side, X (a I + b A + c A A) with A = Xᵀ X.

    Args:
        x: (m, n), fp32 | bf16 | fp16, of any scale.
        steps: iterations; three products each.

    Returns:
        (m, n) fp32. An x of zeros, or with a value that is not finite, gives zeros. A rank-deficient x keeps its rank.
    """
    _ops.orthogonalize.check_newton_schulz(x, steps=steps)
    return iterate(x, steps=steps, a=a, b=b, c=c)


def iterate(x, *, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """newton_schulz without its checks; an x in fp64 is iterated in fp64."""
    x = x.to(accumulator(x))
    if x.numel() == 0:
        return x.clone()
    # By the largest entry first: squares of a huge or a tiny x leave the range of fp32.
    size = torch.linalg.vector_norm(x, torch.inf)
    valid = size.isfinite() & (size > 0)
    x = torch.where(valid, x, 0).div_(torch.where(valid, size, 1))
    x.div_(torch.linalg.vector_norm(x).clamp(min=1))
    tall = x.shape[0] > x.shape[1]
    short = min(x.shape)
    gram, factor, other = x.new_empty(short, short), x.new_empty(short, short), torch.empty_like(x)
    for _ in range(steps):
        polynomial_into(factor, gram_into(gram, x, tall), a, b, c)
        torch.mm(x, factor, out=other) if tall else torch.mm(factor, x, out=other)
        x, other = other, x
    return x
