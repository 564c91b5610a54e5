"""Rules for pairs of factors: against straight transcriptions in fp64, and what they promise."""

import pytest
import torch
from torch import nn

from lowrank_sys.lora import adjust_gradients, gora_, gora_ranks, lora_one_, lora_pro, pairs, refactorize, riemannian
from lowrank_sys.lora.gram import grams, sylvester
from lowrank_sys.nn import factorize_model

M, N, R, S = 11, 9, 3, 2.0


def drawn(seed=0, dtype=torch.float64):
    """A, B, the full gradient g, and the gradients of A and B that follow from it."""
    draw = torch.Generator().manual_seed(seed)
    a, b, g = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((R, N), (M, R), (M, N)))
    return [t.to(dtype) for t in (a, b, g, S * b.T @ g, S * g @ a.T)]


def authors_lora_pro(A, B, grad_A, grad_B, s):
    """Theorems 2.1 and 2.2 with inverses, and the Sylvester equation as one linear system of r² unknowns."""
    P, Q = B.T @ B, A @ A.T
    eye = torch.eye(R, dtype=A.dtype)
    C = -torch.linalg.inv(P) @ grad_A @ A.T / s**2
    # With X in row-major order vec(P X + X Q) = (P (x) I + I (x) Qᵀ) vec(X).
    X = torch.linalg.solve(torch.kron(P, eye) + torch.kron(eye, Q.T.contiguous()), C.reshape(-1)).reshape(R, R)
    g_A = torch.linalg.inv(P) @ grad_A / s**2 + X @ A
    outside = torch.eye(M, dtype=A.dtype) - B @ torch.linalg.inv(P) @ B.T
    return g_A, outside @ grad_B @ torch.linalg.inv(Q) / s**2 - B @ X


def test_lora_pro_is_the_authors():
    A, B, _, grad_A, grad_B = drawn()
    for got, want in zip(lora_pro(A, B, grad_A, grad_B, scale=S, damping=0.0), authors_lora_pro(A, B, grad_A, grad_B, S)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_lora_pro_is_the_nearest_to_the_full_gradient_and_then_to_the_pair():
    """By least squares over all pairs: the step of W, and the pair of least change among those with that step."""
    A, B, g, grad_A, grad_B = drawn()
    g_A, g_B = lora_pro(A, B, grad_A, grad_B, scale=S, damping=0.0)
    # vec(s (B g_A + g_B A)), row-major, as a matrix of all R N + M R unknowns.
    eye_n, eye_m = torch.eye(N, dtype=A.dtype), torch.eye(M, dtype=A.dtype)
    J = S * torch.cat([torch.kron(B, eye_n), torch.kron(eye_m, A.T.contiguous())], dim=1)
    start = torch.cat([grad_A.reshape(-1), grad_B.reshape(-1)])
    want = start + torch.linalg.pinv(J) @ (g.reshape(-1) - J @ start)
    torch.testing.assert_close(torch.cat([g_A.reshape(-1), g_B.reshape(-1)]), want, rtol=1e-9, atol=1e-9)


def test_riemannian_is_the_authors():
    A, B, _, grad_A, grad_B = drawn()
    eye = torch.eye(R, dtype=A.dtype)
    got = riemannian(A, B, grad_A, grad_B, scale=S, damping=0.1)
    want = torch.linalg.inv(B.T @ B + 0.1 * eye) @ grad_A, grad_B @ torch.linalg.inv(A @ A.T + 0.1 * eye)
    for each, other in zip(got, want):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-10)


def test_riemannian_steps_do_not_depend_on_how_a_product_is_shared():
    """B T⁻¹ and T A are the same W: the step of W is the same."""
    A, B, g, grad_A, grad_B = drawn()
    T = torch.randn(R, R, dtype=A.dtype, generator=torch.Generator().manual_seed(5))
    a, b = T @ A, B @ torch.linalg.inv(T)
    steps = []
    for x, y in ((A, B), (a, b)):
        d_A, d_B = riemannian(x, y, S * y.T @ g, S * g @ x.T, scale=S, damping=0.0)
        steps.append(y @ d_A + d_B @ x)
    torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loras_first_step(dtype):
    """B = 0: A's gradient is 0 and stays so, B's is that of least squares."""
    A, _, g, *_ = drawn(dtype=dtype)
    B, grad_B = torch.zeros(M, R, dtype=dtype), S * g @ A.T
    g_A, g_B = lora_pro(A, B, torch.zeros(R, N, dtype=dtype), grad_B, scale=S)
    assert not g_A.any()
    torch.testing.assert_close(S * g_B @ A, g @ torch.linalg.pinv(A) @ A, rtol=1e-4, atol=1e-4)
    assert not riemannian(A, B, torch.zeros(R, N, dtype=dtype), grad_B, scale=S)[0].any()


def test_sylvester():
    p, q = (torch.randn(R, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    p[2] = p[0] + p[1]  # singular, Q is not
    c = torch.randn(R, R, dtype=torch.float64)
    x = sylvester(*grams([p, q]), c)
    torch.testing.assert_close(p @ p.T @ x + x @ q @ q.T, c, rtol=1e-9, atol=1e-9)


def model():
    """Two factored layers of different shapes and one rank, a plain one, with B that is not 0."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 4))
    factorize_model(made, rank=3, density=0.1, target_modules=["0", "2"])
    for pair in pairs(made):
        nn.init.normal_(pair.B, std=0.3)
    return made


def loss_of(made, x):
    return made(x).square().mean()


X = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rule, function", [("lora-pro", lora_pro), ("riemannian", riemannian)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_every_step_is_on_adjusted_gradients(kind, rule, function):
    ours, plain = model(), model()
    optimizers = kind(ours.parameters(), lr=1e-3), kind(plain.parameters(), lr=1e-3)
    handle = adjust_gradients(optimizers[0], ours, rule)
    for step in range(4):
        for each in (ours, plain):
            loss_of(each, X).backward()
        if step < 3:
            for pair in pairs(plain):
                new = function(pair.A.detach(), pair.B.detach(), pair.A.grad, pair.B.grad, scale=pair.scale)
                pair.A.grad, pair.B.grad = new
        else:
            handle.remove()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_what_adjust_gradients_refuses():
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    for call, message in (
        (lambda: adjust_gradients(optimizer, made, "adam"), "rule must be one of lora-pro, riemannian, got 'adam'"),
        (lambda: adjust_gradients(optimizer, made, damping=-1.0), "damping must be at least 0, got -1.0"),
        (lambda: adjust_gradients(optimizer, nn.Linear(3, 3)), "model has no pair of factors, got Linear"),
        (lambda: adjust_gradients(optimizer, model()), "optimizer trains no pair of the model, got SGD"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    adjust_gradients(optimizer, made)
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: loss_of(made, X))


def gradients_of(made, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {pair.name: torch.randn(pair.B.shape[0], pair.A.shape[1], generator=draw) for pair in pairs(made)}


def test_lora_one_begins_in_the_singular_space_of_the_gradient():
    made = model()
    gradients = gradients_of(made)
    lora_one_(made, gradients, gamma=8.0)
    for pair in pairs(made):
        u, s, vh = torch.linalg.svd(-gradients[pair.name].double(), full_matrices=False)
        want = u[:, :3] * (s[:3] / s[0] / 8) @ vh[:3]
        torch.testing.assert_close((pair.B @ pair.A).double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.B.T @ pair.B, pair.A @ pair.A.T, rtol=1e-4, atol=1e-5)


def test_gora_begins_with_the_gradient_that_a_sees():
    made = model()
    gradients, before = gradients_of(made), [pair.A.detach().clone() for pair in pairs(made)]
    gora_(made, gradients, step=0.1)
    for pair, a in zip(pairs(made), before):
        assert torch.equal(pair.A, a)
        g, n = gradients[pair.name].double(), a.shape[1]
        want = -0.1 * (n / 3) ** 0.5 * g @ torch.linalg.pinv(a.double()) @ a.double()
        torch.testing.assert_close((pair.scale * pair.B @ pair.A).double(), want, rtol=1e-4, atol=1e-5)


def test_goras_ranks():
    torch.manual_seed(0)
    made = nn.ModuleDict({name: nn.Linear(n, m) for name, m, n in (("a", 20, 30), ("b", 40, 10), ("c", 25, 25), ("d", 30, 20))})
    gradients = {name: torch.randn_like(layer.weight) * size for (name, layer), size in zip(made.items(), (1.0, 0.01, 3.0, 1.0))}
    matter = {name: (made[name].weight * g).abs().mean().item() for name, g in gradients.items()}
    budget = sum(8 * 50**0.5 for _ in matter)
    want = {name: min(max(round(budget * i / sum(matter.values()) / 50**0.5), 4), 32) for name, i in matter.items()}
    assert gora_ranks(made, gradients, 8) == want and want["b"] == 4 and want["c"] > want["a"]
    same = {name: 1 / layer.weight.detach() for name, layer in made.items()}
    assert set(gora_ranks(made, same, 8).values()) == {8}
    assert set(gora_ranks(made, gradients, 8, least=6, most=7).values()) == {6, 7}


def test_bad_gradients_are_refused_before_anything_is_written():
    made = model()
    good = gradients_of(made)
    before = [p.detach().clone() for p in made.parameters()]
    last = list(good)[-1]
    for bad, message in (
        ({}, "gradients must have 0 of shape (16, 12), got None"),
        (good | {last: torch.randn(3, 3)}, f"gradients must have {last} of shape (10, 16), got (3, 3)"),
        (good | {last: torch.zeros(10, 16)}, f"the gradient of {last} must be finite and not all 0, got 0.0"),
        (good | {last: torch.full((10, 16), torch.nan)}, f"the gradient of {last} must be finite and not all 0, got nan"),
    ):
        for start in (lora_one_, gora_):
            with pytest.raises(ValueError) as error:
                start(made, bad)
            assert message in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), before))
    for call, message in (
        (lambda: gora_ranks(made, {"4": torch.zeros(4, 10)}), "must be finite and not all 0, got importance 0.0"),
        (lambda: gora_ranks(made, {"x": torch.ones(2, 2)}), "gradients must be of linear layers of the model, got one for x"),
        (lambda: gora_ranks(made, good, least=3, most=2), "1 <= least <= most, got 3 and 2"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refactorize_balances_and_keeps_the_weight(dtype):
    made = model().to(dtype)
    for pair in pairs(made):
        pair.B.data.mul_(100)
    before = [(pair.B.double() @ pair.A.double()).detach() for pair in pairs(made)]
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    loss_of(made, X.to(dtype)).backward()
    optimizer.step()
    before = [(pair.B.double() @ pair.A.double()).detach() for pair in pairs(made)]
    assert refactorize(made, optimizer) == 2
    eps = torch.finfo(dtype).eps
    for pair, w in zip(pairs(made), before):
        assert pair.A not in optimizer.state and pair.B not in optimizer.state
        b, a = pair.B.double(), pair.A.double()
        assert (b @ a - w).norm() <= 8 * eps * w.norm()
        root = torch.linalg.svdvals(w)[:3]
        for gram in (b.T @ b, a @ a.T):
            assert (gram - torch.diag(root)).norm() <= 8 * eps * root.norm()
    assert made[4].weight in optimizer.state
    loss_of(made, X.to(dtype)).backward()
    optimizer.step()
    assert optimizer.state[pairs(made)[0].A]["step"] == 1


def test_refactorize_leaves_no_direction_dead():
    made = model()
    first, second = pairs(made)
    first.B.data.zero_()
    second.B.data[:, 2] = 0
    a, w = first.A.detach().clone(), (second.B @ second.A).detach()
    refactorize(made)
    assert torch.equal(first.A, a) and not first.B.any()
    torch.testing.assert_close(second.B @ second.A, w, rtol=1e-4, atol=1e-5)
    assert (second.A.norm(dim=1) > 0).all()
    loss_of(made, X).backward()
    assert (second.B.grad.norm(dim=0) > 0).all() and (first.B.grad.norm(dim=0) > 0).all()
