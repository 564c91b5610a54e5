"""Which rows a structured sparse projection keeps (Muhamed et al. 2024, section 3; sampling by exponential keys)."""

import math

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.philox import WORD, philox

# Random words of rows lie where no element of a tensor draws: the highest bit of the counter's index is set.
ROWS = 1 << 31
# Terms of the series of atanh: |s| <= 0.172, so the first one left out is below 1e-17.
TERMS = 11
# A share is a whole number, so that the sum of shares does not depend on the order.
MOST = 2**31 - 1


def random_words(count, *, seed, step, parameter, device):
    """32 random bits (int64 below 2³²) of the rows 0 ... count - 1: word j % 4 of the group j / 4."""
    row = torch.arange(count, dtype=torch.int64, device=device)
    step, parameter = torch.full_like(row, step & WORD), torch.full_like(row, parameter & WORD)
    words = torch.stack(philox((row >> 2 & WORD, row >> 34 | ROWS, step, parameter), seed))
    return words.gather(0, (row & 3).unsqueeze(0)).squeeze(0)


def exponential(words):
    """Standard exponential variables -ln((word + 1) / 2³²) in fp64, by additions, products and quotients alone: the same
    bits on every device, which no library's log promises."""
    m, e = torch.frexp((words + 1).double() * 2.0**-32)
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, 2 * m, m), torch.where(small, e - 1, e).double()
    s = (m - 1) / (m + 1)
    z = s * s
    series = torch.zeros_like(s)
    for k in reversed(range(TERMS)):
        series = series * z + 1 / (2 * k + 1)
    return -(e * math.log(2) + 2 * s * series)


def row_weights(norms):
    """Norms that can be drawn by, in fp64: 0 where a norm is not finite or not positive."""
    return torch.where((norms > 0) & norms.isfinite(), norms, 0).double()


def select_rows(norms, *, r, method, seed=0, step=0, parameter=0):
    """Choose r of the d rows with these norms; everything is a function of (norms, seed, step, parameter).

    Args:
        norms: (d,) fp32, `row_norms` of the gradient. A norm that is not finite or not positive counts as 0; rows of norm 0
            are chosen only after all others, lowest index first. Rows are drawn with probability proportional to `norms`;
            norms.square() draws by energy.
        r: 1 ... d.
        method: 'top', the r largest norms, the lower index first among equals. 'sample', r distinct rows, one after the
            other with probability q_j proportional to the norm among those that are left. 'sample_replace', r independent
            draws from q.
        seed, step, parameter: of the random bits.

    Returns:
        indices: (r,) int32, ascending, without repetition; the same on every device for the same norms.
        scale: (r,) fp32, the diagonal rho, to be applied by both `gather_rows` and `scatter_add_rows_`. 'top': 1. The other
            two make sum_j rho_j² e_j e_jᵀ G an unbiased estimate of G. 'sample': 1 / sqrt(1 - exp(-norm_j tau)) with tau the
            smallest key that was not chosen (the inclusion probability given tau: Cohen and Kaplan 2007), close to
            1 / sqrt(r q_j) where r q_j is small. 'sample_replace': sqrt(c / (r q_j)) for a row that was drawn c times, which
            is 1 / sqrt(r q_j) for each draw; the places that repeated draws leave free go to the first rows that were
            not drawn, with scale 0.
    """
    _ops.sparse.check_select_rows(norms, r=r, method=method)
    weights, d = row_weights(norms), norms.shape[0]
    bits = dict(seed=seed, step=step, parameter=parameter, device=norms.device)
    if method == "top":
        order = torch.argsort(weights, descending=True, stable=True)
        scale = torch.ones_like(weights)
    elif method == "sample":
        keys = torch.where(weights > 0, exponential(random_words(d, **bits)) / weights, torch.inf)
        order = torch.argsort(keys, stable=True)
        threshold = keys[order[r]] if r < d else torch.full_like(keys[0], torch.inf)
        scale = torch.where(threshold.isinf() | (weights == 0), 1.0, (-torch.expm1(-weights * threshold)).rsqrt())
    else:
        counts, shares = draw_rows(weights, r, bits)
        order = torch.argsort((counts == 0).to(torch.int8), stable=True)
        scale = torch.where(counts > 0, (counts * shares.sum().double() / (r * shares.double())).sqrt(), 0.0)
    indices = order[:r].sort().values
    return indices.to(torch.int32), scale[indices].float()


def draw_rows(weights, r, bits):
    """How often each row is drawn in r draws, and its share of all draws, as a whole number."""
    largest = weights.amax()
    shares = torch.where(weights > 0, (weights / largest * MOST).floor().to(torch.int64) + 1, 0)
    ends = shares.cumsum(0)
    u = random_words(r, **bits) >> 1
    # floor(u * total / 2³¹), in halves: the product would overflow.
    at = u * (ends[-1] >> 31) + (u * (ends[-1] & MOST) >> 31)
    rows = torch.searchsorted(ends, at, right=True).clamp(max=len(weights) - 1)
    return torch.zeros_like(shares).index_add(0, rows, torch.ones_like(rows)) * (shares > 0), shares
