"""A Gaussian basis from its seed (Hao et al. 2024, Flora; Zhu et al. 2024, APOLLO): made where it is used, never stored."""

import math

import torch

from lowrank_sys import _ops
from lowrank_sys.reference import galore
from lowrank_sys.reference.philox import WORD, philox

# A counter serves four rows that lie ROWS apart; the basis' counters have this bit of their second word.
ROWS = 16
TAG = 0x80000000
LOG = (-0.10082372, 0.161805, -0.17243226, 0.19906883, -0.24971228, 0.33334715, -0.50000323)
SINE = (-0.00460218, 0.07968023, -0.64596348, 1.57079632)
COSINE = (9.0677127e-4, -0.020861542, 0.25366945, -1.23370055, 1.0)


def _polynomial(x, coefficients):
    first, *rest = coefficients
    value = torch.full_like(x, first)
    for c in rest:
        value = value * x + c
    return value


def _minus_two_log(u):
    """-2 ln u, where u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))."""
    shifted = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    e = ((shifted >> 23) - 127).to(torch.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    return (e * 0.69314718 + (f + f * f * _polynomial(f, LOG))) * -2.0


def normal_pair(first, second):
    """Two independent normals (fp32) from two words (int64 below 2³²): Box and Muller 1958, operation by operation in fp32."""
    u = ((first >> 9).to(torch.float32) + 0.5) * 2.0**-23
    # By way of fp64: torch's square root in fp32 is not always rounded to nearest.
    radius = _minus_two_log(u).double().sqrt().float()
    t = ((second >> 8 & 0x3FFFFF).to(torch.float32) + 0.5) * 2.0**-22 - 0.5
    sine, cosine = _polynomial(t * t, SINE) * t, _polynomial(t * t, COSINE)
    odd, upper = (second >> 30 & 1).bool(), (second >> 31 & 1).bool()
    x, z = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return radius * torch.where(odd != upper, -x, x), radius * torch.where(upper, -z, z)


def gaussian_basis(d, rank, *, seed, step, parameter, first=0, device="cpu"):
    """Rows first ... first + d - 1 of the basis (d, rank), fp32, of N(0, 1/rank); step counts refreshes.

    Row 64 b + 16 k + l, column j: normal k of the four that Philox with key = seed makes of counter
    ((16 b + l) rank + j as two words, the second with its highest bit set, step, parameter).
    """
    row = torch.arange(first, first + d, dtype=torch.int64, device=device)[:, None]
    counter = (row // (4 * ROWS) * ROWS + row % ROWS) * rank + torch.arange(rank, device=device)
    word = torch.zeros_like(counter)
    words = philox((counter & WORD, counter >> 32 & WORD | TAG, word + (step & WORD), word + (parameter & WORD)), seed)
    four = torch.stack((*normal_pair(*words[:2]), *normal_pair(*words[2:])))
    which = (row // ROWS % 4).expand_as(counter)[None]
    # The square root of an integer and its reciprocal in fp64, rounded once.
    return four.gather(0, which)[0] * torch.tensor(1.0 / math.sqrt(rank), dtype=torch.float32, device=device)


def gaussian_basis_(out, *, seed, step, parameter, first=0):
    """out <- rows first ... of the basis; out (d, rank) fp32 | bf16 | fp16, rounded to nearest even."""
    _ops.gaussian.check_basis(out, first)
    out.copy_(gaussian_basis(*out.shape, seed=seed, step=step, parameter=parameter, first=first, device=out.device))


def _basis_for(matrix, rank, left, **which):
    b = gaussian_basis(matrix.shape[0 if left else 1], rank, device=matrix.device, **which)
    return b.double() if matrix.dtype == torch.float64 else b


def gaussian_project(grad, *, rank, left, seed, step, parameter, first=0):
    """R = Bᵀ G (rank, n) if left, else G B (m, rank); fp32. grad (m, n) fp32 | bf16 | fp16; `first` is the index of the
    projected axis' first entry in the unsharded tensor."""
    if grad.dtype != torch.float64:
        _ops.gaussian.check_project(grad, rank, first)
    return galore.project(grad, _basis_for(grad, rank, left, seed=seed, step=step, parameter=parameter, first=first), left=left)


def gaussian_back_project_(param, low_rank, *, alpha=1.0, beta=1.0, left, seed, step, parameter, first=0):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X (rank, n) if left, else (m, rank), fp32.

    beta = 0 does not read W, as in BLAS.
    """
    if param.dtype != torch.float64:
        _ops.gaussian.check_back_project(param, low_rank, left, first)
    basis = _basis_for(param, low_rank.shape[0 if left else 1], left, seed=seed, step=step, parameter=parameter, first=first)
    galore.back_project_(param, low_rank, basis, alpha=alpha, beta=beta, left=left)
