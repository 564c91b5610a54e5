"""subspace_iteration and svd_basis: energy, orthonormality, rank-deficient and hostile gradients."""

import pytest
import torch
from lanes import usual
from refreshed import advance

from lowrank_sys.subspace import iteration
from lowrank_sys.subspace.iteration import leading_eigenvectors, svd_basis
from lowrank_sys.subspace.orthonormal import Orthonormal

SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
M, N, R = 160, 200, 24


@pytest.fixture(params=["lapack", "cholesky"], autouse=True)
def factorizations(request, monkeypatch):
    """The CPU's, and those of a GPU, which run on any device."""
    if request.param == "cholesky":
        monkeypatch.setattr(iteration, "LAPACK", ())


def gradient(spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = min(M, N)
    u = torch.linalg.qr(torch.randn(M, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(N, k, generator=generator, dtype=torch.float64))[0]
    return ((u * spectrum(torch.arange(k, dtype=torch.float64))) @ v.T).float()


def iterate(grad, basis=None, rank=R, left=True, **options):
    return torch.ops.lowrank.subspace_iteration(grad, basis, rank=rank, left=left, **options)


def energy_share(grad, basis, left):
    """Energy of the projection as a share of the best that this rank can hold."""
    g, b = grad.double(), basis.double()
    best = torch.linalg.svdvals(g)[: b.shape[1]].square().sum()
    return ((b.T @ g if left else g @ b).square().sum() / best).item()


def assert_orthonormal(basis):
    error = (basis.double().T @ basis.double() - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max().item()
    assert error < 2e-6, error


SPECTRA = {
    "power law": lambda i: 1 / (1 + i),
    "flat": lambda i: torch.ones_like(i),
    "exponential": lambda i: torch.exp(-i / 5),
    "steep": lambda i: torch.exp(-2 * i),
    "rank 1": lambda i: (i < 1).double(),
    "rank below r": lambda i: (i < R // 2).double(),
    "tiny": lambda i: 1e-25 / (1 + i),
    "huge": lambda i: 1e25 / (1 + i),
}


@SIDES
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_energy(name, left, warm):
    grad = gradient(SPECTRA[name])
    old = iterate(gradient(SPECTRA["power law"], seed=1), left=left)[0] if warm else None
    basis, energies = iterate(grad, old, left=left)
    assert basis.shape == ((M if left else N), R) and basis.dtype == torch.float32 and basis.is_contiguous()
    assert_orthonormal(basis)
    assert energy_share(grad, basis, left) > 0.99
    assert (energies[:-1] >= energies[1:]).all()


@SIDES
@pytest.mark.parametrize("rank", [1, 63, M])
def test_any_rank(rank, left):
    grad = gradient(SPECTRA["power law"])
    basis, _ = iterate(grad, rank=rank, left=left)
    assert_orthonormal(basis)
    assert energy_share(grad, basis, left) > 0.99


@SIDES
def test_thin_matrix(left):
    for shape in ((1, 40), (40, 1)):
        basis, _ = iterate(torch.randn(shape), rank=1, left=left)
        assert_orthonormal(basis)


@SIDES
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_useless_gradient_keeps_the_old_basis(bad, left):
    grad = torch.zeros(M, N)
    grad[3, 5] = bad
    cold, energies = iterate(grad, left=left)
    assert_orthonormal(cold)
    assert (energies == 0).all()
    warm, energies = iterate(grad, cold, left=left)
    assert torch.equal(warm, cold) and (energies == 0).all()
    assert torch.equal(svd_basis(grad, cold, rank=R, left=left)[0], cold)
    assert_orthonormal(svd_basis(grad, None, rank=R, left=left)[0])


@SIDES
def test_signs_are_canonical(left):
    grad = gradient(SPECTRA["power law"])
    for cold in (iterate(grad, left=left)[0], svd_basis(grad, None, rank=R, left=left)[0]):
        pivot = cold.gather(0, cold.abs().argmax(dim=0, keepdim=True))
        assert (pivot > 0).all()
        for warm in (iterate(-grad, cold, left=left)[0], svd_basis(-grad, cold, rank=R, left=left)[0]):
            assert ((cold * warm).sum(dim=0) >= 0).all()


@SIDES
def test_same_seed_same_basis(left):
    grad = gradient(SPECTRA["power law"])
    torch.manual_seed(1)
    first = iterate(grad, left=left, seed=5)[0]
    torch.manual_seed(2)
    assert torch.equal(first, iterate(grad, left=left, seed=5)[0])
    assert not torch.equal(first, iterate(grad, left=left, seed=6)[0])


@SIDES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient(dtype, left):
    grad = gradient(SPECTRA["power law"]).to(dtype)
    basis, _ = iterate(grad, left=left)
    assert basis.dtype == torch.float32
    assert energy_share(grad.float(), basis, left) > 0.99


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": M + 1}, rf"rank must be at most min\(m, n\) of grad \({M}, {N}\), got {M + 1}"),
        ({"n_iter": -1}, "n_iter must be at least 0, got -1"),
        ({"oversample": -1}, "oversample must be at least 0, got -1"),
        ({"basis": torch.zeros(M, R), "n_iter": 0}, "n_iter must be at least 1, got 0"),
        ({"basis": torch.zeros(M, R + 1)}, f"basis must have rank = {R} columns, got {R + 1}"),
        ({"basis": torch.zeros(N, R)}, rf"basis must have shape \(m = {M}, r\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        iterate(torch.randn(M, N), **arguments)


# --- what a refresh does to the state


def refresh(state, grad, left, moments, countdown=0):
    names = ("basis", "exp_avg", "exp_avg_sq", "step")
    state = dict(zip(names, state)) | {"countdown": torch.tensor(countdown), "first_gap": 10, "seed": 0}
    advance(Orthonormal(), [grad], [state], left=left, update_proj_gap=10, moments=moments)


def trained(left, dtype=torch.float32):
    """basis, exp_avg, exp_avg_sq, step of a matrix in training."""
    shape, generator = (R, N) if left else (M, R), torch.Generator().manual_seed(3)
    return [
        iterate(gradient(SPECTRA["power law"]), left=left)[0].to(dtype),
        torch.randn(shape, generator=generator),
        torch.rand(shape, generator=generator),
        torch.tensor(7.0),
    ]


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_refresh_writes_the_rotated_moments(left, dtype):
    """The transported moments are the state, not a copy of it, and belong to the basis that is stored."""
    state = trained(left, dtype)
    old, m, v, step = (x.clone() for x in state)
    refresh(state, gradient(SPECTRA["power law"], seed=1), left, "rotate")
    c = state[0].double().T @ old.double()
    want_m, want_v = (c @ m.double(), c.square() @ v.double()) if left else (m.double() @ c.T, v.double() @ c.square().T)
    assert not torch.equal(state[1], m) and not torch.equal(state[2], v) and state[3] == step
    torch.testing.assert_close(state[1].double(), want_m, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(state[2].double(), want_v, atol=2e-6, rtol=2e-6)
    assert (state[2] >= 0).all()


@SIDES
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_the_subspace_moves_on_either_side(left, moments):
    """A new gradient's energy is found, on the right side as on the left."""
    state, grad = trained(left), gradient(SPECTRA["exponential"], seed=5)
    old = state[0].clone()
    refresh(state, grad, left, moments)
    assert energy_share(grad, state[0], left) > 0.99 > energy_share(grad, old, left)
    overlap = (old.double().T @ state[0].double()).square().sum() / R
    assert overlap < 0.9


@SIDES
@pytest.mark.parametrize("moments", ["reset", "rotate"])
def test_a_refresh_keeps_the_callers_buffers(left, moments):
    """The state's own memory is written: whoever holds a tensor of it sees the refresh, and no two of them share memory."""
    state = trained(left)
    held, where = list(state), [x.data_ptr() for x in state]
    refresh(state, gradient(SPECTRA["power law"], seed=1), left, moments)
    assert all(a is b for a, b in zip(held, state)) and [x.data_ptr() for x in state] == where
    before = [x.clone() for x in state]
    state[1].add_(1)
    assert torch.equal(state[2], before[2]) and torch.equal(state[0], before[0])
    if moments == "reset":
        assert (before[1] == 0).all() and (before[2] == 0).all() and before[3] == 0


@SIDES
def test_a_useless_gradient_leaves_the_moments_as_they_are(left):
    state = trained(left)
    before = [x.clone() for x in state]
    refresh(state, torch.full((M, N), torch.nan), left, "rotate")
    assert all(torch.equal(a, b) for a, b in zip(state, before))


@pytest.mark.parametrize("rank, decay", usual([(30, 2)], (100, 4), (255, 0)))
def test_many_directions_of_a_gram_of_low_rank_are_orthonormal(rank, decay):
    """As with fewer tokens than a large rank: most of the directions have no energy."""
    generator = torch.Generator().manual_seed(rank)
    y = torch.randn(700, rank, generator=generator) * torch.logspace(0, -decay, rank) @ torch.randn(rank, 1152, generator=generator)
    v = leading_eigenvectors(y.T @ y / y.abs().amax() ** 2, 1024)
    torch.testing.assert_close(v.T @ v, torch.eye(1024), atol=1e-5, rtol=0)
