"""APOLLO, Fira and FRUGAL in C++ against the oracle in fp64, and the identities that the methods promise."""

import pytest
import torch

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys.reference.gaussian import gaussian_basis

ops = torch.ops.lowrank
pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 200, 1), (200, 1, 1), (63, 100, 7), (129, 64, 64), (1100, 1030, 5), (0, 20, 3), (20, 0, 3)]
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
METHODS = {
    "apollo": ("apollo_step", dict(scale=1.5)),
    "apollo-front": ("apollo_step", dict(scale=1.5, scale_front=True)),
    "apollo-tensor": ("apollo_step", dict(scale=4.0, per_tensor=True)),
    "apollo-gaussian": ("apollo_step", dict(scale=1.0)),
    "apollo-free": ("apollo_step", dict(scale=1.0)),
    "fira": ("fira_step", dict(alpha=0.25)),
    "fira-one": ("fira_step", dict(alpha=1.0)),
    "fira-gram": ("fira_step", dict(alpha=0.5)),
    "fira-free": ("fira_step", dict(alpha=0.25)),
    "frugal": ("frugal_step", dict(scale=0.5, residual_scale=0.1, sign=True)),
    "frugal-sgd": ("frugal_step", dict(scale=0.5, residual_scale=0.1, sign=False)),
}
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
EVERY = pytest.mark.parametrize("method", METHODS)


class Case:
    """One matrix: tensors for an op, and its name and hyper-parameters."""

    def __init__(self, method, m, n, r, left, dtype=torch.float32, grad_dtype=None, basis_dtype=torch.float32, seed=0):
        draw = torch.Generator().manual_seed(seed)
        d, shape = (m, (r, n)) if left else (n, (m, r))
        self.name, self.hyper = METHODS[method][0], METHODS[method][1] | ADAM | dict(left=left)
        self.left, self.method = left, method
        basis = torch.randn(d, r, generator=draw)
        if method.startswith("fira") and method != "fira-gram" and d >= r:
            basis = torch.linalg.qr(basis).Q if d else basis
        basis = (basis if d >= r and "fira" in method and method != "fira-gram" else basis / max(d, 1) ** 0.5).contiguous()
        if method == "apollo-gaussian":
            basis = torch.tensor([-7, 3, 11, 5])
        else:
            basis = basis.to(basis_dtype)
        self.tensors = [
            torch.randn(m, n, generator=draw).to(dtype),
            torch.randn(m, n, generator=draw).to(grad_dtype or dtype),
            basis,
            torch.randn(shape, generator=draw),
            torch.rand(shape, generator=draw) + 0.1,
        ]
        if self.name != "frugal_step":
            self.tensors.append(None if "free" in method else torch.tensor(0.8))
        if self.name == "fira_step":
            self.tensors.append(basis.float().T @ basis.float() if method == "fira-gram" else None)

    def double(self):
        return [t if t is None or t.dtype == torch.int64 else t.double() for t in self.tensors]

    def oracle(self, tensors, **numbers):
        reference.named(self.name)(*tensors, **self.hyper, **numbers)
        return tensors

    def run(self, tensors=None, **numbers):
        return getattr(ops, self.name)(*(tensors or self.tensors), **self.hyper, **numbers)


def clone(tensors):
    return [clone(t) if isinstance(t, list) else t if t is None else t.clone() for t in tensors]


def near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and not (error > tolerance).any(), (
        f"off by {error.max()}, allowed {torch.as_tensor(tolerance).max()}"
    )


def check(case, got, want, before, keep=None):
    """`got` after a step of lr 0.1 against the oracle in fp64; `before` is what the op was given."""
    param, grad, basis, m, v = got[:5]
    depth, r = max(1, param.shape[0 if case.left else 1]), m.shape[0 if case.left else 1]
    size = 1 + max((t.double().abs().max().item() for t in (want[3], want[1]) if t.numel()), default=0.0)
    # fp32 sums of `depth` terms in any order: one rounding for each root of the depth, of terms of this size.
    r_error = 2.0**-23 * depth**0.5 * size * 4
    near(m, want[3], 2.0**-22 * size + r_error)
    near(v, want[4], 2.0**-22 * (size * size + want[4].abs()) + 2 * size * r_error * 4)
    # A basis of full rank leaves a residual of nothing but rounding.
    if len(got) > 5 and got[5] is not None and not (case.name == "fira_step" and depth <= r):
        near(got[5], want[5], 1e-5 * want[5].abs() * depth**0.5)
    moved = (want[0] - (1 - 0.1 * 0.1) * before[0].double()).abs()
    bound = ROUNDING[param.dtype] * (2 * want[0].abs() + 2.0**-14) + 4e-6 * (r + depth) ** 0.5 * (
        moved.max() if moved.numel() else 0
    )
    if case.method == "frugal" and param.numel():
        # The sign is free where the residual is within rounding of zero.
        r64 = reference.project(want[1], want[2], left=case.left)
        residual = want[1] - reference.galore.back(r64, want[2], case.left)
        free = residual.abs() <= 2.0**-18 * depth**0.5 * size
        assert free.double().mean() < 0.02 or param.numel() < 2000
        bound = bound + free * 0.1 * 0.1 * 2
    near(param, want[0], bound)


@SIDES
@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape, method, left):
    case = Case(method, *shape, left)
    before, want = clone(case.tensors), case.double()
    assert case.run(step=3, lr=0.1) is None
    case.oracle(want, step=3, lr=0.1)
    check(case, case.tensors, want, before)


@SIDES
def test_a_key_is_its_basis(left):
    case = Case("apollo-gaussian", 130, 150, 9, left)
    seed, step, parameter, first = case.tensors[2].tolist()
    basis = gaussian_basis(130 if left else 150, 9, seed=seed, step=step, parameter=parameter, first=first)
    got, want = clone(case.tensors), clone(case.tensors)
    want[2] = basis
    case.run(got, step=1, lr=0.1), case.run(want, step=1, lr=0.1)
    for a, b in zip(got[3:], want[3:]):
        near(a, b, 1e-5)
    near(got[0], want[0], 1e-5)


@SIDES
@EVERY
def test_bad_channels_keep_their_bits_and_leave_the_norms(method, left):
    case = Case(method, 130, 140, 6, left)
    grad = case.tensors[1] if left else case.tensors[1].T
    bad = torch.zeros(grad.shape[1], dtype=torch.bool)
    bad[[3, 10, 11, 20]] = True
    grad[5, 3], grad[0, 10], grad[7, 11], grad[:, 20] = torch.nan, torch.inf, -torch.inf, 1e30
    before = clone(case.tensors)
    columns = [[] if t is None else [t] for t in case.tensors]
    columns[:5] = [[t] for t in case.tensors[:5]]
    skipped = torch.tensor(7)
    getattr(ops, case.name)(*columns, [torch.tensor(4.0)], lr=torch.tensor(0.1), **case.hyper, skipped=skipped)
    assert skipped == 7 + int(bad.sum()) * grad.shape[0]
    pick = (lambda t, keep: t[:, keep]) if left else (lambda t, keep: t[keep])
    for i in (0, 3, 4):
        assert torch.equal(pick(case.tensors[i], bad), pick(before[i], bad))
    # The usable channels step as if the others did not exist: the limiter's norm counts them alone.
    alone = [t if t is None else pick(t, ~bad).contiguous() if i in (0, 1, 3, 4) else t for i, t in enumerate(before)]
    case.run(alone, step=5, lr=0.1)
    for i in (0, 3, 4):
        near(pick(case.tensors[i], ~bad), alone[i], 1e-5)
    if len(alone) > 5 and alone[5] is not None:
        near(case.tensors[5], alone[5], 1e-5)


@pytest.mark.parametrize("method", ["apollo", "fira", "frugal", "frugal-sgd"])
def test_a_zero_gradient_decays_alone(method):
    case = Case(method, 20, 30, 4, True)
    case.tensors[1].zero_(), case.tensors[3].zero_()
    before = clone(case.tensors)
    case.run(step=1, lr=0.1)
    near(case.tensors[0], (1 - 0.1 * 0.1) * before[0], 1e-7)
    if len(before) > 5:
        assert torch.equal(case.tensors[5], before[5])


@EVERY
def test_weight_decay_is_torchs(method):
    """Decay comes before the update and by lr alone: the same step without it differs by lr * weight_decay * W."""
    one, two = (Case(method, 40, 50, 5, True) for _ in range(2))
    w = one.tensors[0].clone()
    two.hyper = two.hyper | dict(weight_decay=0.0)
    one.run(step=3, lr=0.1), two.run(step=3, lr=0.1)
    near(two.tensors[0] - one.tensors[0], 0.1 * 0.1 * w, 2e-6)


def test_apollo_at_full_information_is_adam_for_one_row():
    """d = 1 and B = 1: R = G, s |G| = |N|, so a step is Adam's with eps outside of the bias correction."""
    w, g = torch.randn(1, 50), torch.randn(1, 50)
    param, m, v = w.clone(), torch.zeros(1, 50), torch.zeros(1, 50)
    ops.apollo_step(param, g, torch.ones(1, 1), m, v, step=1, lr=0.1, **ADAM | dict(eps=1e-12), scale=1.0, left=True)
    # |N| = sqrt(0.1² g² / 0.001 g²), times sqrt(0.001) / 0.1: the first step of Adam has length lr.
    near(param, (1 - 0.01) * w - 0.1 * g.sign(), 1e-5)


@SIDES
def test_the_residual_of_fira_with_alpha_one_is_orthogonal_to_the_basis(left):
    case = Case("fira-free", 60, 80, 7, left)
    case.hyper = case.hyper | dict(alpha=1.0, weight_decay=0.0)
    w, g, b, m, v = clone(case.tensors[:5])
    case.run(step=1, lr=1.0)
    moved = w - case.tensors[0]
    rate = (1 - 0.999) ** 0.5 / (1 - 0.9)
    n = case.tensors[3] / (case.tensors[4].sqrt() + 1e-8)
    # Bᵀ of the update is a (alpha N): nothing of the scaled residual is inside.
    near(ops.project(moved, b, left=left), rate * n, 1e-4)


@SIDES
def test_fira_against_the_formula(left):
    """Chen et al. 2024, written out in fp64: several steps, teacher-forced by nothing."""
    torch.manual_seed(0)
    m, n, r, alpha, lr, beta1, beta2, eps = 40, 60, 6, 0.25, 0.01, 0.9, 0.999, 1e-6
    basis = torch.linalg.qr(torch.randn(m if left else n, r, dtype=torch.float64)).Q.contiguous()
    w = torch.randn(m, n, dtype=torch.float64)
    shape = (r, n) if left else (m, r)
    tensors = [w.float(), None, basis.float(), torch.zeros(shape), torch.zeros(shape), torch.zeros(())]
    first, second, before = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), None
    dim = 0 if left else 1
    limited = False
    for step in range(1, 6):
        g = torch.randn(m, n, dtype=torch.float64) * (20 if step == 3 else 1)
        tensors[1] = g.float()
        ops.fira_step(*tensors, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, alpha=alpha, left=left)
        low = basis.T @ g if left else g @ basis
        first, second = beta1 * first + (1 - beta1) * low, beta2 * second + (1 - beta2) * low**2
        norm = first / (second.sqrt() + eps)
        up = (lambda x: basis @ x) if left else (lambda x: x @ basis.T)
        s = norm.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        residual = (g - alpha * up(low)) * s
        if before is None:
            before = residual.norm()
        else:
            limiter = max(residual.norm() / (before + 1e-8), 1.01) / 1.01
            limited |= limiter > 1
            residual = residual / limiter
            before = residual.norm()
        w = w - lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) * (alpha * up(norm) + residual)
        near(tensors[0], w, 1e-5)
        near(tensors[5], before, 1e-4 * before)
    assert limited


def test_a_limiter_lets_the_norm_grow_by_growth():
    case = Case("apollo", 40, 50, 5, True)
    case.tensors[5].fill_(1e-3)
    case.run(step=3, lr=0.1)
    near(case.tensors[5], torch.tensor(1.01e-3), 1e-7)
    zero = Case("apollo", 40, 50, 5, True)
    zero.tensors[5].zero_()
    zero.run(step=3, lr=0.1)
    free = Case("apollo-free", 40, 50, 5, True)
    free.hyper = zero.hyper
    free.run(step=3, lr=0.1)
    assert torch.equal(zero.tensors[0], free.tensors[0]) and zero.tensors[5] > 0
