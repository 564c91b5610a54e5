"""One op at one size, what the microbenchmark knows of an op, and the inputs and bases that several ops share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw as torch_adamw

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


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
    def side(self):
        """'left' | 'right' of the basis; None where the op has none."""
        return {True: "left", False: "right", None: None}[self.left]

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
    call: Callable  # (function, tensors, case) -> tensors that hold the result; all of it is timed
    traffic: Callable  # case -> bytes
    flop: Callable  # case -> FLOP
    bases: dict  # name -> (tensors, case) -> a function to time; the first is the default
    overload: str  # the row of backends.table() that is called
    oracle: Callable
    ranked: bool = True
    sided: bool = True
    truth: Callable | None = None  # called on fp64 tensors in place of the oracle
    read: Callable = lambda outputs: outputs  # what `call` returns -> what is compared
    exact: bool = False  # the results are codes or indices: equal to the oracle's at the same precision
    chooses: bool = False  # the result is a basis of G: what counts is that it is orthonormal and what it captures
    other: str = ""  # what takes the time where it is neither the counted bytes nor the counted products


def low_rank(case):
    return (case.rank, case.n) if case.left else (case.m, case.rank)


def orthonormal(case, randn):
    d = case.m if case.left else case.n
    return torch.linalg.qr(randn(d, case.rank, dtype=torch.float32)).Q.to(case.dtype).contiguous()


def moments(shape, randn):
    return {
        "exp_avg": 0.1 * randn(*shape, dtype=torch.float32),
        "exp_avg_sq": 0.01 + 0.01 * randn(*shape, dtype=torch.float32).square(),
    }


def scalars(case):
    return {name: torch.tensor(value, device=case.device) for name, value in (("step", 10.0), ("lr", 0.1))}


def refresh(f, state, gradient, lr, numbers, *, moments=(), **options):
    """Call `refresh_` on one matrix. state, numbers: its tensors and integers, by name. moments: names of those in
    the state."""
    f(
        list(state.values()), [gradient], [*numbers.values(), 200], lr, keys=list(state), number_keys=[*numbers, "first_gap"],
        moments=list(moments), signed=[name == "exp_avg" for name in moments], hyper_keys=["update_proj_gap"], hyper=[200.0],
        **options,
    )  # fmt: skip


def adam_bytes(elements):
    """Two fp32 moments, read and written."""
    return 16 * elements


def copy_of(traffic):
    """A copy that reads and writes as many bytes together."""

    def base(t, case):
        source = torch.zeros(traffic(case) // 2, dtype=torch.uint8, device=case.device)
        out = torch.ones_like(source)
        return lambda: out.copy_(source)

    return base


def product(t, case):
    """The bare GEMM of `project`, in the dtype of the case."""
    grad, basis = t["grad"], t["basis"]
    out = grad.new_empty(low_rank(case))
    return (lambda: torch.mm(basis.T, grad, out=out)) if case.left else (lambda: torch.mm(grad, basis, out=out))


def product_back(t, case):
    """The bare GEMM of `back_project_`, accumulating into the weights."""
    param, basis = t["param"], t["basis"]
    x = 1e-3 * basis.new_ones(low_rank(case))
    return (lambda: param.addmm_(basis, x)) if case.left else (lambda: param.addmm_(x, basis.T))


def two_products(t, case):
    project, back = product(t, case), product_back(t, case)

    def run():
        project()
        back()

    return run


def _adam(r, exp_avg, exp_avg_sq, step):
    """Adam's update from R, its moments in place."""
    exp_avg.lerp_(r, 1 - ADAM["beta1"])
    exp_avg_sq.lerp_(r.square(), 1 - ADAM["beta2"])
    root = (exp_avg_sq / (1 - ADAM["beta2"] ** step)).sqrt_().add_(ADAM["eps"])
    return exp_avg / (1 - ADAM["beta1"] ** step) / root


def _foreach_adam(r, exp_avg, exp_avg_sq, step):
    """The same as a step of torch.optim.AdamW on all of R, from weights of zero; step: a tensor on the device."""
    update = torch.zeros_like(r)
    torch_adamw(
        [update],
        [r],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=True,
        capturable=r.is_cuda,
        amsgrad=False,
        maximize=False,
        lr=1.0,
        **ADAM,
    )
    return update


@functools.cache
def _compiled_adam():
    return torch.compile(_adam, dynamic=True)


def products_and(adam):
    """What one would write without fused kernels: project, Adam on R in fp32, and back to the weights. adam: -> function."""

    def base(t, case):
        grad, basis, param = t["grad"], t["basis"], t["param"]
        stored, step = moments(low_rank(case), lambda *shape, dtype: torch.randn(shape, dtype=dtype, device=case.device)), t["step"]
        rule = adam()

        def run():
            r = (basis.T @ grad if case.left else grad @ basis).float()
            x = rule(r, stored["exp_avg"], stored["exp_avg_sq"], step).to(basis.dtype)
            param.addmm_(basis, x, alpha=-0.025) if case.left else param.addmm_(x, basis.T, alpha=-0.025)

        return run

    return base


COMPOSED = {"gemms-compiled-adam": products_and(_compiled_adam), "gemms-foreach-adam": products_and(lambda: _foreach_adam)}
