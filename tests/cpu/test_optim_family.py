"""APOLLO, Fira, Grass and FRUGAL: each against its formula written out, its state, and what all optimizers promise."""

import copy

import pytest
import torch
from family import FAMILY
from lanes import usual
from torch import nn

from lowrank_sys.optim import APOLLOAdamW, FiraAdamW, FrugalAdamW, GrassAdamW, InBackward, param_groups
from lowrank_sys.reference.gaussian import gaussian_basis

EACH = pytest.mark.parametrize("name", FAMILY)
SIDES = pytest.mark.parametrize("proj_type", ["left", "right"])
M, N, R = 12, 8, 4
BETAS, EPS = (0.9, 0.999), 1e-6


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 20))


def backward(net, step):
    net.zero_grad()
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
    loss = net(x).square().mean()
    loss.backward()


def matrix(cls, shape=(M, N), count=1, lr=1e-2, options=None, **keys):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    optimizer = cls([{"params": params, "rank": R, "update_proj_gap": 3, **keys}], lr=lr, **(options or {}))
    return (params[0] if count == 1 else params), optimizer


def draw(param, step):
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(step)) * (30 if step == 2 else 1)


def snapshot(optimizer):
    return copy.deepcopy(
        [[p.data for group in optimizer.param_groups for p in group["params"]], list(optimizer.state_dict()["state"].values())]
    )


def assert_same(before, after):
    assert all(map(torch.equal, before[0], after[0]))
    for then, now in zip(before[1], after[1]):
        assert all(torch.equal(v, now[k]) if isinstance(v, torch.Tensor) else v == now[k] for k, v in then.items())


class Written:
    """The moments, the norms and the limiter in fp64, as in the papers' pseudocode; `left` projects rows."""

    def __init__(self, left):
        self.left, self.m, self.v, self.t, self.last = left, 0, 0, 0, 0.0

    def project(self, g, b):
        return b.T @ g if self.left else g @ b

    def back(self, x, b):
        return b @ x if self.left else x @ b.T

    def adam(self, r):
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * r, 0.999 * self.v + 0.001 * r * r
        return self.m / (self.v.sqrt() + EPS), (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)

    def norm(self, x):
        return x.norm(dim=0 if self.left else 1, keepdim=True)

    def limit(self, s):
        norm = s.norm().item()
        if self.last:
            s = s / (max(norm / (self.last + 1e-8), 1.01) / 1.01)
        self.last = s.norm().item()
        return s


@SIDES
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["random", "svd"])
def test_apollo_is_its_formula(proj_type, scale_type, proj):
    param, optimizer = matrix(
        APOLLOAdamW, proj_type=proj_type, scale_type=scale_type, proj=proj, scale=4.0, options={"weight_decay": 0.1}
    )
    left = proj_type == "left"
    rule, w, seen = Written(left), param.detach().double(), []
    for step in range(7):
        param.grad = draw(param, step)
        optimizer.step()
        state, g = optimizer.state[param], param.grad.double()
        if proj == "random":
            seed, refresh, parameter, first = state["key"].tolist()
            assert (seed, parameter, first) == (0, 0, 0) and "basis" not in state
            seen.append(refresh)
            b = gaussian_basis(M if left else N, R, seed=0, step=refresh, parameter=0).double()
        else:
            b = state["basis"].double()
        r = rule.project(g, b)
        n, corrected = rule.adam(r)
        s = rule.norm(n) / rule.norm(r) if scale_type == "channel" else n.norm() / r.norm()
        w = (1 - 1e-3) * w - 1e-2 * corrected * 2.0 * rule.limit(g * s)
        torch.testing.assert_close(param.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert state["limiter"].item() == pytest.approx(rule.last, rel=1e-5)
    assert seen in ([], [0, 0, 0, 1, 1, 1, 2])


@SIDES
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_fira_is_its_formula(proj_type, alpha):
    param, optimizer = matrix(FiraAdamW, proj_type=proj_type, alpha=alpha, options={"weight_decay": 0.1})
    rule, w = Written(proj_type == "left"), param.detach().double()
    for step in range(7):
        param.grad = draw(param, step)
        optimizer.step()
        b, g = optimizer.state[param]["basis"].double(), param.grad.double()
        r = rule.project(g, b)
        n, corrected = rule.adam(r)
        residual = rule.limit((g - alpha * rule.back(r, b)) * rule.norm(n) / rule.norm(r))
        if alpha == 1.0:
            assert rule.project(residual, b).abs().max() < 1e-4 * residual.abs().max()
        w = (1 - 1e-3) * w - 1e-2 * corrected * (alpha * rule.back(n, b) + residual)
        torch.testing.assert_close(param.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert optimizer.state[param]["limiter"].item() == pytest.approx(rule.last, rel=1e-5)


@SIDES
@pytest.mark.parametrize("rule_name", ["sign_sgd", "sgd"])
def test_frugal_is_its_formula(proj_type, rule_name):
    param, optimizer = matrix(
        FrugalAdamW,
        proj_type=proj_type,
        residual_scale=0.5,
        subspace="svd",
        options={"inactive_update_rule": rule_name, "eps": EPS},
    )
    rule, w = Written(proj_type == "left"), param.detach().double()
    for step in range(7):
        if step % 3 == 0:
            rule = Written(rule.left)  # moments and step begin anew
        param.grad = draw(param, step)
        optimizer.step()
        b, g = optimizer.state[param]["basis"].double(), param.grad.double()
        r = rule.project(g, b)
        rule.adam(r)
        x = rule.m / (1 - 0.9**rule.t) / ((rule.v / (1 - 0.999**rule.t)).sqrt() + EPS)
        rest = g - rule.back(r, b)
        w = (1 - 1e-4) * w - 1e-2 * (rule.back(x, b) + 0.5 * (rest.sign() if rule_name == "sign_sgd" else rest))
        torch.testing.assert_close(param.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert optimizer.state[param]["step"].item() == rule.t


@SIDES
def test_grass_moves_the_rows_of_largest_norm(proj_type):
    param, optimizer = matrix(GrassAdamW, proj_type=proj_type, scale=0.5)
    axis = 0 if proj_type == "left" else 1
    for step in range(7):
        before, param.grad = param.detach().clone(), draw(param, step)
        optimizer.step()
        state = optimizer.state[param]
        # the first selection serves one step, the others the gap
        since = (1, 1, 2, 3, 1, 2, 3)[step]
        if since == 1:
            kept = param.grad.norm(dim=1 - axis).topk(R).indices.sort().values
        assert torch.equal(state["indices"].long(), kept) and state["step"].item() == since
        moved = (param.detach() != before).any(dim=1 - axis).nonzero().flatten()
        assert torch.equal(moved, kept)
        if since == 1:  # of fresh moments, Adam's step is the sign
            rows = param.grad.index_select(axis, kept).sign()
            torch.testing.assert_close(param.detach().index_select(axis, kept), before.index_select(axis, kept) - 1e-2 * 0.5 * rows)
    assert "row_scale" not in state


def test_grass_draws_rows_by_seed_step_and_matrix():
    def run(seed):
        params, optimizer = matrix(GrassAdamW, shape=(60, 40), count=2, subspace="sample", seed=seed)
        drawn = []
        for _ in range(5):
            for p in params:
                p.grad = draw(p, 0)
            optimizer.step()
            drawn.append([tuple(optimizer.state[p]["indices"].tolist()) for p in params])
        assert all((optimizer.state[p]["row_scale"] > 0).all() for p in params)
        return drawn

    first = run(0)
    assert first == run(0) != run(1)
    assert first[0][0] != first[0][1] and len({rows[0] for rows in first}) >= 2


def test_grass_keeps_moments_if_told():
    param, optimizer = matrix(GrassAdamW, moments="keep")
    for step in range(5):
        param.grad = draw(param, step)
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 5


def test_a_gaussian_basis_is_the_same_now_or_next():
    results = []
    for refresh in ("now", "next"):
        param, optimizer = matrix(APOLLOAdamW, refresh=refresh)
        for step in range(8):
            param.grad = draw(param, step)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_apollo_resets_moments_if_told():
    param, optimizer = matrix(APOLLOAdamW, moments="reset")
    for step in range(4):
        param.grad = draw(param, step)
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 1 and optimizer.state[param]["key"][1] == 1


def test_mini_is_one_scale_from_one_vector():
    net = model()
    optimizer = APOLLOAdamW(param_groups(net, **APOLLOAdamW.mini))
    backward(net, 0)
    optimizer.step()
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (33, 1)
    assert optimizer.param_groups[1]["scale"] == 128
    assert APOLLOAdamW(param_groups(model(), rank=1, scale_type="tensor")).param_groups[1]["scale"] == 128
    assert APOLLOAdamW(param_groups(model(), rank=1)).param_groups[1]["scale"] == 1


@EACH
def test_state_bytes_are_the_formula(name):
    net = model()
    optimizer = FAMILY[name](net)
    backward(net, 0)
    optimizer.step()
    want = sum(2 * 4 * bias.numel() + 4 for bias in (net[0].bias, net[2].bias))
    for m, n in ((33, 20), (20, 33)):
        d, rank = min(m, n), optimizer.param_groups[1]["rank"]
        basis = {"apollo": 4 * 8, "apollo-mini": 4 * 8, "grass": 4 * rank, "grass sampled": 8 * rank}.get(name, 4 * d * rank)
        counters = 4 + 8 + (4 if name.startswith(("apollo", "fira")) else 0) + (8 if name.startswith("grass") else 0)
        want += 2 * 4 * rank * max(m, n) + basis + counters
    assert optimizer.state_bytes() == want
    assert optimizer.memory()["other"] == 0


@EACH
def test_in_backward_is_the_ordinary_step(name):
    nets = model(), model()
    optimizers = FAMILY[name](nets[0]), FAMILY[name](nets[1], per_layer="in_backward")
    for step in range(9):
        for net, optimizer in zip(nets, optimizers):
            backward(net, step)
            optimizer.step()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@EACH
def test_in_backward_clips_by_the_last_norm(name):
    net, tight = model(), model()
    optimizers = FAMILY[name](net), FAMILY[name](tight, per_layer=InBackward(max_norm=1e-3))
    for step in range(3):
        for each, optimizer in zip((net, tight), optimizers):
            backward(each, step)
            optimizer.step()
    norms = [optimizer.state[each[0].weight]["exp_avg"].norm() for each, optimizer in zip((net, tight), optimizers)]
    assert norms[1] < 0.7 * norms[0] and all(p.isfinite().all() for p in tight.parameters())


@pytest.mark.parametrize("name", [name for name in FAMILY if not name.startswith("grass")])  # its rows may come from sketches
def test_accumulation_is_refused(name):
    with pytest.raises(ValueError, match="per_layer='accumulate' needs a rule that can start from R, got .*AdamW"):
        FAMILY[name](model(), per_layer="accumulate")


@EACH
@SIDES
def test_gradient_that_is_not_finite(name, proj_type):
    net = nn.Sequential(nn.Linear(20, 33))
    optimizer = FAMILY[name](net)
    weight, left = net[0].weight, proj_type == "left"
    optimizer.param_groups[1]["proj_type"] = proj_type
    weight.grad = draw(weight, 0)
    optimizer.step()
    before = snapshot(optimizer)
    weight.grad = draw(weight, 1)
    row = optimizer.state[weight]["indices"][0] if "indices" in optimizer.state[weight] else 3
    at = (row, 5) if left else (5, row)
    weight.grad[at] = float("nan")
    optimizer.param_groups[1]["update_proj_gap"] = 100
    optimizer.state[weight]["countdown"].fill_(50)
    optimizer.step()
    channel = (slice(None), 5) if left else (5, slice(None))
    now = snapshot(optimizer)
    assert torch.equal(now[0][1][channel], before[0][1][channel]) and not torch.equal(now[0][1], before[0][1])
    assert now[0][1].isfinite().all()
    for then, state in zip(before[1], now[1]):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][channel], then[key][channel]) and state[key].isfinite().all()
    assert optimizer.skipped() == (33 if left else 20)


def test_a_row_that_is_not_finite_is_not_selected():
    param, optimizer = matrix(GrassAdamW)
    param.grad = draw(param, 0)
    param.grad[:, 2] = float("inf")
    optimizer.step()
    assert 2 not in optimizer.state[param]["indices"] and optimizer.skipped() == 0


@EACH
def test_found_inf_is_no_step(name):
    net = model()
    optimizer = FAMILY[name](net)
    for step in range(2):
        backward(net, step)
        optimizer.step()
    for group in optimizer.param_groups[1:]:
        for param in group["params"]:
            optimizer.state[param]["countdown"].fill_(9)
    before = snapshot(optimizer)
    backward(net, 2)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = snapshot(optimizer)
    for state in (*before[1], *after[1]):
        state.pop("countdown", None)  # the schedule is the host's, and goes on
    assert_same(before, after)


@EACH
def test_rate_0_is_no_refresh(name):
    net = model()
    optimizer = FAMILY[name](net)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weights = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        net.zero_grad()
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, weights, net.parameters()))
    state = optimizer.state[net[0].weight]
    assert state["countdown"] == (7 if "key" in state else -1)


@pytest.mark.parametrize("name", usual(["fira"], *(name for name in FAMILY if name != "fira")))
def test_compiles_without_a_break(name):
    nets = model(), model()
    optimizers = [FAMILY[name](net) for net in nets]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-2)
    torch._dynamo.reset()
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="eager")
    for i in range(9):
        for net in nets:
            backward(net, i)
        step()
        optimizers[1].step()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize(
    "cls, keys, message",
    [
        (APOLLOAdamW, {"proj": "gaussian"}, "proj must be one of random, svd, got 'gaussian'"),
        (APOLLOAdamW, {"scale_type": "row"}, "scale_type must be one of channel, tensor, got 'row'"),
        (APOLLOAdamW, {"moments": "rotate"}, "moments must be one of keep, reset with proj='random', got 'rotate'"),
        (APOLLOAdamW, {"scale": -1.0}, "scale must be a number of at least 0, got -1.0"),
        (FiraAdamW, {"alpha": float("nan")}, "alpha must be a number of at least 0, got nan"),
        (FrugalAdamW, {"residual_scale": "1"}, "residual_scale must be a number of at least 0, got '1'"),
        (FrugalAdamW, {"options": {"inactive_update_rule": "no"}}, "inactive_update_rule must be one of sign_sgd, sgd, got 'no'"),
        (GrassAdamW, {"subspace": "randomized"}, "subspace must be one of top, sample, sample_replace, uniform, got 'randomized'"),
        (GrassAdamW, {"moments": "rotate"}, "moments must be one of keep, reset, got 'rotate'"),
        (GrassAdamW, {"refresh": "later"}, "refresh must be one of now, next, got 'later'"),
        (GrassAdamW, {"options": {"betas": (1.0, 0.9)}}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_bad_arguments(cls, keys, message):
    with pytest.raises(ValueError, match=message):
        matrix(cls, **keys)
