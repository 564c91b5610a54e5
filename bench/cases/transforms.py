"""Moments in a new basis, DCT columns, and orthogonalized updates."""

import torch

from lowrank_sys.bench.cases.case import Op, low_rank, moments, orthonormal
from lowrank_sys.subspace import orthogonalize, transport
from lowrank_sys.subspace.dct import column_norms, dct_columns, dct_select

STEPS = 5


def _rotate_inputs(case, randn):
    return {**moments(low_rank(case), randn), "old": orthonormal(case, randn), "new": orthonormal(case, randn)}


def _rotate(f, t, case):
    f(t["exp_avg"], t["exp_avg_sq"], t["old"], t["new"], left=case.left)
    return [t["exp_avg"], t["exp_avg_sq"]]


def _two_rotations(t, case):
    c = t["new"].float().T @ t["old"].float()

    def run():
        for name in ("exp_avg", "exp_avg_sq"):
            c @ t[name] if case.left else t[name] @ c

    return run


def newton_schulz_products(t, case):
    """The bare GEMMs of newton_schulz: x xᵀ, its square, and their product with x."""
    x = t["x"].float()
    tall, short = x.shape[0] > x.shape[1], min(x.shape)
    gram, square, out = x.new_empty(short, short), x.new_empty(short, short), torch.empty_like(x)

    def run():
        for _ in range(STEPS):
            torch.mm(x.T, x, out=gram) if tall else torch.mm(x, x.T, out=gram)
            torch.mm(gram, gram, out=square)
            torch.mm(x, square, out=out) if tall else torch.mm(square, x, out=out)

    return run


def _in_bf16(t, case):
    """The same iteration as Muon runs it: in bf16 throughout."""
    x = t["x"].bfloat16()
    x = (x.T if x.shape[0] > x.shape[1] else x).contiguous()

    def run():
        y = x / x.norm()
        for _ in range(STEPS):
            gram = y @ y.T
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
        return y

    return run


def _newton_schulz_flop(case):
    short, wide = sorted((case.m, case.n))
    return STEPS * (4 * short * short * wide + 2 * short**3)


def _rotated(exp_avg, exp_avg_sq, old, new, *, left):
    """rotate_moments_ at any precision."""
    c = transport.rotation(old, new, exp_avg.dtype)
    for moment, turned in ((exp_avg, c), (exp_avg_sq, c * c)):
        moment.copy_(transport.rotated(moment, turned, left=left))


OPS = {
    "rotate_moments_": Op(
        _rotate_inputs,
        _rotate,
        traffic=lambda c: 16 * c.low_rank + 2 * c.element * c.basis,
        flop=lambda c: 2 * c.rank * (2 * c.low_rank + c.basis),
        bases={"gemms": _two_rotations},
        overload="rotate_moments_",
        oracle=_rotated,
    ),
    "dct_select": Op(
        lambda case, randn: {"grad": randn(case.m, case.n)},
        lambda f, t, c: [f(t["grad"], rank=c.rank, left=c.left)[1].sum()],  # columns of nearly equal norm may change places
        traffic=lambda c: c.element * c.matrix,
        flop=lambda c: 5 * c.matrix * max(c.m, c.n).bit_length() // 2,
        bases={"fft": lambda t, c: lambda: torch.fft.rfft(t["grad"].float(), dim=0 if c.left else 1)},
        overload="dct_select",
        oracle=dct_select,
        other="an FFT",
        truth=lambda grad, *, rank, left: (None, column_norms(grad, left=left).topk(rank).values),
    ),
    "dct_columns": Op(
        lambda case, randn: {"indices": torch.arange(case.rank, device=case.device, dtype=torch.int32)},
        lambda f, t, c: [f(t["indices"], d=c.m if c.left else c.n)],
        traffic=lambda c: 4 * c.basis,
        flop=lambda c: 8 * c.basis,
        bases={"cos": lambda t, c: lambda: torch.zeros(c.m if c.left else c.n, c.rank, device=c.device).cos()},
        overload="dct_columns",
        oracle=dct_columns,
        exact=True,
        other="cosines",
    ),
    "newton_schulz": Op(
        lambda case, randn: {"x": randn(case.m, case.n)},
        lambda f, t, c: [f(t["x"], steps=STEPS)],
        traffic=lambda c: c.element * c.matrix + 4 * (2 * STEPS + 1) * c.matrix,
        flop=_newton_schulz_flop,
        bases={"gemms": newton_schulz_products, "bf16": _in_bf16},
        overload="newton_schulz",
        oracle=orthogonalize.newton_schulz,
        ranked=False,
        sided=False,
        truth=orthogonalize.iterate,
    ),
}
