"""What the microbenchmark knows of each op: inputs, the call, counted bytes and FLOP, and what it is compared with.

Bytes count each operand once per kernel that must read or write it: the least traffic of the op as designed, so caches and
temporaries of an implementation do not raise its GB/s. FLOP count the products.
"""

from typing import Callable, NamedTuple

import torch
from torch.optim.adamw import adamw as torch_adamw

from lowrank_sys import backends, reference
from lowrank_sys.reference.subspace import subspace_iteration

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
N_ITER = 2


class Case(NamedTuple):
    """One op at one size; rank and left are None where the op has none."""

    op: str
    m: int
    n: int
    rank: int | None
    dtype: torch.dtype
    left: bool | None
    device: str

    @property
    def element(self):
        return self.dtype.itemsize

    @property
    def matrix(self):
        """Elements of G."""
        return self.m * self.n

    @property
    def basis(self):
        """Elements of B."""
        return (self.m if self.left else self.n) * self.rank

    @property
    def low_rank(self):
        """Elements of R."""
        return (self.n if self.left else self.m) * self.rank


class Op(NamedTuple):
    inputs: Callable  # (case, randn) -> {name: tensor}
    call: Callable  # (function, tensors, case) -> tensors that hold the result
    traffic: Callable  # case -> bytes
    flop: Callable  # case -> FLOP
    bases: dict  # name -> (tensors, case) -> a function to time; the first is the default
    overload: str  # the row of backends.table() that is called
    oracle: Callable
    ranked: bool = True
    sided: bool = True
    truth: Callable | None = None  # called on fp64 tensors in place of the oracle


def make(case):
    """Fresh inputs of a case, the same at every call."""
    generator = torch.Generator(case.device).manual_seed(0)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    return OPS[case.op].inputs(case, randn)


def serving(case):
    """(who serves the op, the function)."""
    wanted = (OPS[case.op].overload, torch.device(case.device).type)
    name = next(row.implementation for row in backends.table() if (row.op, row.device) == wanted)
    return name, getattr(torch.ops.lowrank, case.op)


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def _low_rank(case):
    return (case.rank, case.n) if case.left else (case.m, case.rank)


def _orthonormal(case, randn):
    d = case.m if case.left else case.n
    return torch.linalg.qr(randn(d, case.rank, dtype=torch.float32)).Q.to(case.dtype).contiguous()


def _moments(shape, randn):
    return {"exp_avg": 0.1 * randn(*shape, dtype=torch.float32),
            "exp_avg_sq": 0.01 + 0.01 * randn(*shape, dtype=torch.float32).square()}


def _scalars(case):
    return {name: torch.tensor(value, device=case.device) for name, value in (("step", 10.0), ("lr", 0.1))}


def _galore_inputs(case, randn):
    return {"param": randn(case.m, case.n), "grad": randn(case.m, case.n), "basis": _orthonormal(case, randn),
            **_moments(_low_rank(case), randn), **_scalars(case)}


def _subspace_inputs(case, randn):
    return {"param": randn(case.m, case.n), "low_rank": randn(*_low_rank(case), dtype=torch.float32),
            "basis": _orthonormal(case, randn), **_moments(_low_rank(case), randn), **_scalars(case)}


def _project_inputs(case, randn):
    return {"grad": randn(case.m, case.n), "basis": _orthonormal(case, randn)}


def _back_project_inputs(case, randn):
    return {"param": randn(case.m, case.n), "low_rank": randn(*_low_rank(case), dtype=torch.float32),
            "basis": _orthonormal(case, randn)}


def _norms_inputs(case, randn):
    return {"grad": randn(case.m, case.n)}


def _adamw_inputs(case, randn):
    return {"param": randn(case.m, case.n), "grad": randn(case.m, case.n), **_moments((case.m, case.n), randn),
            **_scalars(case)}


def _iteration_inputs(case, randn):
    # Singular values that fall off as 1/i, and an old basis that knows nothing of G.
    k = min(case.m, case.n)
    decay = 1 / torch.arange(1, k + 1, device=case.device)
    grad = (randn(case.m, k, dtype=torch.float32) * decay) @ randn(k, case.n, dtype=torch.float32)
    return {"grad": (grad / grad.std()).to(case.dtype), "basis": _orthonormal(case, randn)}


def _galore_step(f, t, case):
    f(t["param"], t["grad"], t["basis"], t["exp_avg"], t["exp_avg_sq"], step=t["step"], lr=t["lr"], scale=0.25, left=case.left,
      **ADAM)
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _subspace_step(f, t, case):
    f(t["param"], t["low_rank"], t["basis"], t["exp_avg"], t["exp_avg_sq"], step=t["step"], lr=t["lr"], scale=0.25,
      left=case.left, **ADAM)
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _back_project(f, t, case):
    # beta < 1 keeps the weights bounded over many calls.
    f(t["param"], t["low_rank"], t["basis"], alpha=0.25, beta=0.99, left=case.left)
    return [t["param"]]


def _adamw_step(f, t, case):
    f([t["param"]], [t["grad"]], [t["exp_avg"]], [t["exp_avg_sq"]], [t["step"]], lr=t["lr"], **ADAM)
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _torch_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, *, lr, fused=False, **hyper):
    torch_adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=False, fused=fused, lr=lr, amsgrad=False,
                maximize=False, **hyper)


def _fused_adamw(t, case):
    # torch keeps the moments in the dtype of the weights.
    lists = [[t[name].to(case.dtype)] for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    return lambda: _torch_adamw(*lists, [t["step"]], lr=0.1, fused=True, **ADAM)


def _product(t, case):
    """The bare GEMM of `project`, in the dtype of the case."""
    grad, basis = t["grad"], t["basis"]
    out = grad.new_empty(_low_rank(case))
    return (lambda: torch.mm(basis.T, grad, out=out)) if case.left else (lambda: torch.mm(grad, basis, out=out))


def _product_back(t, case):
    """The bare GEMM of `back_project_`, accumulating into the weights."""
    param, basis = t["param"], t["basis"]
    x = 1e-3 * basis.new_ones(_low_rank(case))
    return (lambda: param.addmm_(basis, x)) if case.left else (lambda: param.addmm_(x, basis.T))


def _two_products(t, case):
    project, back = _product(t, case), _product_back(t, case)

    def run():
        project()
        back()

    return run


def _adam_bytes(elements):
    """Two fp32 moments, read and written."""
    return 16 * elements


OPS = {
    "galore_step": Op(
        _galore_inputs, _galore_step,
        traffic=lambda c: c.element * (3 * c.matrix + 2 * c.basis) + _adam_bytes(c.low_rank),
        flop=lambda c: 4 * c.matrix * c.rank,
        bases={"gemms": _two_products}, overload="galore_step.tensor", oracle=reference.galore_step),
    "subspace_step": Op(
        _subspace_inputs, _subspace_step,
        traffic=lambda c: c.element * (2 * c.matrix + c.basis) + 4 * c.low_rank + _adam_bytes(c.low_rank),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _product_back}, overload="subspace_step.tensor", oracle=reference.subspace_step),
    "project": Op(
        _project_inputs, lambda f, t, c: [f(t["grad"], t["basis"], left=c.left)],
        traffic=lambda c: c.element * (c.matrix + c.basis) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _product}, overload="project", oracle=reference.project),
    "back_project_": Op(
        _back_project_inputs, _back_project,
        traffic=lambda c: c.element * (2 * c.matrix + c.basis) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _product_back}, overload="back_project_", oracle=reference.back_project_),
    "channel_norms": Op(
        _norms_inputs, lambda f, t, c: [f(t["grad"], left=c.left)],
        traffic=lambda c: c.element * c.matrix + 4 * (c.n if c.left else c.m),
        flop=lambda c: 2 * c.matrix,
        bases={"vector_norm": lambda t, c: lambda: torch.linalg.vector_norm(t["grad"], dim=0 if c.left else 1)},
        overload="channel_norms", oracle=reference.channel_norms, ranked=False),
    "adamw_step": Op(
        _adamw_inputs, _adamw_step,
        traffic=lambda c: c.element * 3 * c.matrix + _adam_bytes(c.matrix),
        flop=lambda c: 12 * c.matrix,
        bases={"fused-adamw": _fused_adamw}, overload="adamw_step", oracle=reference.adamw_step, ranked=False, sided=False,
        truth=_torch_adamw),
    "subspace_iteration": Op(
        _iteration_inputs, lambda f, t, c: list(f(t["grad"], t["basis"], rank=c.rank, left=c.left, n_iter=N_ITER)),
        # 2 n_iter products with G on r + r/8 columns; what happens on the columns alone is not counted.
        traffic=lambda c: 2 * N_ITER * c.element * c.matrix,
        flop=lambda c: 4 * N_ITER * c.matrix * min(c.rank + -(-c.rank // 8), c.m, c.n),
        bases={"svd": lambda t, c: lambda: torch.linalg.svd(t["grad"].float(), full_matrices=False)},
        overload="subspace_iteration", oracle=subspace_iteration),
}

# Timed once: at 4096 x 4096 it takes most of a minute.
ONCE = ("svd",)
