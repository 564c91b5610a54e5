"""Choosing a basis."""

import torch

from lowrank_sys.bench.cases.case import Op, orthonormal
from lowrank_sys.reference.subspace import subspace_iteration

N_ITER = 2


def _iteration_inputs(case, randn):
    # Singular values that fall off as 1/i, and an old basis that knows nothing of G.
    k = min(case.m, case.n)
    decay = 1 / torch.arange(1, k + 1, device=case.device)
    grad = (randn(case.m, k, dtype=torch.float32) * decay) @ randn(k, case.n, dtype=torch.float32)
    return {"grad": (grad / grad.std()).to(case.dtype), "basis": orthonormal(case, randn)}


OPS = {
    "subspace_iteration": Op(
        _iteration_inputs, lambda f, t, c: list(f(t["grad"], t["basis"], rank=c.rank, left=c.left, n_iter=N_ITER)),
        # 2 n_iter products with G on r + r/8 columns; what happens on the columns alone is not counted.
        traffic=lambda c: 2 * N_ITER * c.element * c.matrix,
        flop=lambda c: 4 * N_ITER * c.matrix * min(c.rank + -(-c.rank // 8), c.m, c.n),
        bases={"svd": lambda t, c: lambda: torch.linalg.svd(t["grad"].float(), full_matrices=False)},
        overload="subspace_iteration", oracle=subspace_iteration),
}
