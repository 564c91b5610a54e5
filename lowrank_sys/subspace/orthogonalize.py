"""Newton-Schulz orthogonalization as Muon does it (Jordan et al. 2024)."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator
from lowrank_sys.subspace.shards import WHOLE

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


def on_tensor_cores(x):
    return x.is_cuda and x.dtype == torch.float32


def parts(x, many):
    """x as a sum of bf16 matrices: one, or two that hold 16 bits together."""
    high = x.to(torch.bfloat16)
    return (high, (x - high).to(torch.bfloat16)) if many else (high,)


def side_by_side(x, many, axis):
    """Parts of an operand along the summed axis: high high low against high low high, without the product of the low parts."""
    high, *low = parts(x, many)
    return torch.cat((high, high, *low) if axis else (high, *low, high), axis) if many else high


def tensor_core_product(left, right, many):
    """left @ right in fp32 from bf16 parts of both, in one GEMM."""
    return torch.mm(side_by_side(left, many, 1), side_by_side(right, many, 0), out_dtype=torch.float32)


def tensor_core_step(x, many, tall, a, b, c, shard=WHOLE):
    """a X + (b A + c A A) X. X itself is not rounded: what rounding puts outside of its range would be amplified every step."""
    gram = shard.sum(tensor_core_product(x.T, x, many) if tall else tensor_core_product(x, x.T, many))
    factor = tensor_core_product(gram, gram, many).mul_(c).add_(gram, alpha=b)
    update = tensor_core_product(x, factor, many) if tall else tensor_core_product(factor, x, many)
    return update.add_(x, alpha=a)


def newton_schulz(x, *, steps=5, a=3.4445, b=-4.7750, c=2.0315):
    """Move all singular values of x (m, n) towards 1: X <- (a I + b A + c A A) X with A = X Xᵀ, from X = x / |x|_F.

    With the published coefficients five steps bring singular values from 0.01 |x|_F on into about [0.7, 1.2]; they oscillate
    around 1 by design. A tall x is iterated on its short side, X (a I + b A + c A A) with A = Xᵀ X.

    Products are fp32's on a CPU. On a GPU they run on the tensor cores with fp32 sums, whatever torch's switches say: for an
    x of 16 bits in bf16, as Muon's, which moves singular values by 0.03 at most; for one in fp32 as three products of bf16
    parts, which moves them by 1e-4.

    Args:
        x: (m, n), fp32 | bf16 | fp16, of any scale.
        steps: iterations; three products each.

    Returns:
        (m, n) fp32. An x of zeros, or with a value that is not finite, gives zeros. A rank-deficient x keeps its rank.
    """
    _ops.orthogonalize.check_newton_schulz(x, steps=steps)
    return iterate(x, steps=steps, a=a, b=b, c=c)


def iterate(x, *, steps=5, a=3.4445, b=-4.7750, c=2.0315, shard=WHOLE):
    """newton_schulz without its checks; an x in fp64 is iterated in fp64. shard: that the rows of x are of, always on the side of
    its columns."""
    many = x.dtype.itemsize > 2
    x = x.to(accumulator(x))
    if x.numel() == 0 and not shard.group:
        return x.clone()
    # By the largest entry first: squares of a huge or a tiny x leave the range of fp32.
    largest = torch.linalg.vector_norm(x, torch.inf) if x.numel() else x.new_zeros(())
    size = shard.norms(largest)
    valid = size.isfinite() & (size > 0)
    x = torch.where(valid, x, 0).div_(torch.where(valid, size, 1))
    x.div_(shard.norms(torch.linalg.vector_norm(x)).clamp(min=1))
    tall = bool(shard.group) or x.shape[0] > x.shape[1]
    if on_tensor_cores(x):
        for _ in range(steps):
            x = tensor_core_step(x, many, tall, a, b, c, shard)
        return x
    short = x.shape[1 if tall else 0]
    gram, factor, other = x.new_empty(short, short), x.new_empty(short, short), torch.empty_like(x)
    for _ in range(steps):
        polynomial_into(factor, shard.sum(gram_into(gram, x, tall)), a, b, c)
        torch.mm(x, factor, out=other) if tall else torch.mm(factor, x, out=other)
        x, other = other, x
    return x
