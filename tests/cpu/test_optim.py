"""LowRankOptimizer: groups, schedule, moments, the non-finite rule, state and resume."""

import copy
import io
import math

import pytest
import torch
from family import FAMILY
from small_model import VOCAB, build
from torch import nn

from lowrank_sys.optim import GaLoreAdafactor, GaLoreAdamW, param_groups


def backward(model, step):
    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens)
    loss.backward()
    return loss.item()


def adamw(model, rank=16, lr=1e-2, options=None, **keys):
    return GaLoreAdamW(param_groups(model, rank=rank, **{"update_proj_gap": 7, **keys}), lr=lr, **(options or {}))


OPTIMIZERS = {
    "adamw": adamw,
    "adamw svd": lambda model: adamw(model, subspace="svd"),
    "adamw rotate": lambda model: adamw(model, moments="rotate"),
    "adamw reset": lambda model: adamw(model, moments="reset"),
    "adamw short-moments": lambda model: adamw(model, proj_type="short-moments"),
    "adafactor": lambda model: GaLoreAdafactor(param_groups(model, rank=16, update_proj_gap=7)),
    **FAMILY,
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


@EACH
def test_trains(name):
    model = build()
    optimizer = OPTIMIZERS[name](model)
    first = backward(model, 0)
    for step in range(40):
        last = backward(model, step)
        optimizer.step()
    assert last < 0.5 * first
    assert optimizer.skipped() == 0


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_in_the_middle_of_a_gap_is_exact(name, dtype):
    model = build(dtype)
    optimizer = OPTIMIZERS[name](model)
    for step in range(10):
        backward(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = {i: dict(state) for i, state in optimizer.state_dict()["state"].items()}

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = build(dtype)
    resumed_optimizer = OPTIMIZERS[name](resumed)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    for i, state in resumed_optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == saved[i][key].dtype, key
    for step in range(10, 24):
        for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
            backward(m, step)
            o.step()
    for (key, p), q in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), key


def test_state_is_tensors_and_plain_numbers():
    model = build()
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()
    for state in optimizer.state.values():
        assert all(isinstance(value, (torch.Tensor, bool, int)) for value in state.values())
    linear = optimizer.state[model[1].weight]
    assert linear["basis"].shape == (48, 16) and not linear["left"]
    assert linear["exp_avg"].shape == linear["exp_avg_sq"].shape == (96, 16)
    assert "basis" not in optimizer.state[model.head.weight]
    assert optimizer.state_bytes() == sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )


@pytest.mark.parametrize(
    "proj_type, wide, tall",
    [
        ("std", True, False),
        ("reverse_std", False, True),
        ("left", True, True),
        ("right", False, False),
        ("short-moments", False, True),
    ],
)
def test_side(proj_type, wide, tall):
    params = [nn.Parameter(torch.randn(shape)) for shape in ((20, 40), (40, 20), (20, 20))]
    optimizer = GaLoreAdamW([{"params": params, "rank": 20, "proj_type": proj_type}])
    for param in params:
        param.grad = torch.randn_like(param)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert [optimizer.state[p]["left"] for p in params] == [wide, tall, tall]  # square matrices count as tall
    assert not any(torch.equal(p, q) for p, q in zip(params, before))
    if proj_type == "short-moments":
        assert all(optimizer.state[p]["exp_avg"].numel() == 400 for p in params)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "short-moments"])
@pytest.mark.parametrize("subspace", ["randomized", "svd"])
def test_a_rank_as_large_as_a_side_is_full_rank(subspace, proj_type):
    """Cold and warm refreshes leave no room to oversample; the basis is square or spans the whole row or column space."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((20, 40), (40, 20), (20, 20), (1, 20))]
    groups = [
        {"params": [p], "rank": min(p.shape), "proj_type": proj_type, "subspace": subspace, "update_proj_gap": 2} for p in params
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    for _ in range(5):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before))
    for p in params:
        state = optimizer.state[p]
        b = state["basis"]
        torch.testing.assert_close(b.T @ b, torch.eye(b.shape[1]), atol=1e-5, rtol=0)


def refreshed(optimizer, params):
    """Indices of the matrices whose basis the next step changes."""
    before = [optimizer.state[p]["basis"].clone() if optimizer.state[p] else None for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return [i for i, (p, b) in enumerate(zip(params, before)) if b is None or not torch.equal(optimizer.state[p]["basis"], b)]


@pytest.mark.parametrize("count, gap", [(6, 3), (3, 6), (1, 4), (5, 5)])
def test_refreshes_are_staggered(count, gap):
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(count)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 2, "update_proj_gap": gap}])
    assert refreshed(optimizer, params) == list(range(count))
    history = [refreshed(optimizer, params) for _ in range(2 * gap)]
    assert max(map(len, history)) == math.ceil(count / gap)
    for start in (0, gap):
        assert sorted(sum(history[start : start + gap], [])) == list(range(count))


def test_svd_refreshes_as_the_reference():
    params = [nn.Parameter(torch.randn(8, 6)) for _ in range(4)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 2, "update_proj_gap": 5, "subspace": "svd"}])
    history = [len(refreshed(optimizer, params)) for _ in range(11)]
    assert history == [4, 0, 0, 0, 0, 4, 0, 0, 0, 0, 4]


def test_a_step_with_rate_0_leaves_a_valid_basis_and_is_no_refresh():
    param = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4}], lr=0.0, weight_decay=0.1)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    basis = optimizer.state[param]["basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)
    optimizer.param_groups[0]["lr"] = 1e-2
    first = basis.clone()
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert not torch.equal(optimizer.state[param]["basis"], first)


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_moments_at_a_refresh(moments):
    param = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4, "update_proj_gap": 3, "subspace": "svd", "moments": moments}])
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    state = optimizer.state[param]
    old, m = state["basis"].clone(), state["exp_avg"].clone()
    param.grad = torch.randn_like(param)
    optimizer.step()
    r = param.grad @ state["basis"]
    carried = {"keep": m, "reset": torch.zeros_like(m), "rotate": m @ (old.T @ state["basis"])}[moments]
    torch.testing.assert_close(state["exp_avg"], 0.9 * carried + 0.1 * r, atol=1e-5, rtol=1e-4)
    assert state["step"].item() == (1 if moments == "reset" else 4)
    assert (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_gradient_that_is_not_finite(bad, proj_type):
    matrix, vector = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(5))
    optimizer = GaLoreAdamW(
        [{"params": [vector]}, {"params": [matrix], "rank": 4, "proj_type": proj_type}], lr=1e-2, weight_decay=0.1
    )
    for p in (matrix, vector):
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy((matrix.data, vector.data, optimizer.state_dict()["state"]))
    for p in (matrix, vector):
        p.grad = torch.randn_like(p)
    matrix.grad[3, 5] = bad
    vector.grad[2] = bad
    optimizer.step()

    channel = (slice(None), 5) if proj_type == "left" else (3, slice(None))
    state = optimizer.state_dict()["state"]
    for now, was, where in ((matrix.data, before[0], channel), (vector.data, before[1], 2)):
        assert torch.equal(now[where], was[where])
        assert now.isfinite().all() and (now != was).sum() == now.numel() - now[where].numel()
    for i, where in ((0, 2), (1, channel)):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[i][key][where], before[2][i][key][where])
            assert state[i][key].isfinite().all()
    assert optimizer.skipped() == (12 if proj_type == "left" else 8) + 1


def test_a_refresh_on_a_gradient_that_is_not_finite_keeps_the_basis():
    param = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4, "update_proj_gap": 1}])
    param.grad = torch.randn_like(param)
    optimizer.step()
    old = optimizer.state[param]["basis"].clone()
    param.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], old)


def test_nonfinite_raise_names_the_parameter_and_writes_nothing():
    model = build()
    optimizer = adamw(model, options={"nonfinite": "raise"})
    backward(model, 0)
    model[3].weight.grad[1, 1] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="3.weight"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not optimizer.state


def test_grad_scaler():
    """Unscaling inside the step equals a step without a scaler, and an overflow is a no-op with its counters."""
    models = [build(), build()]
    optimizers = [adamw(m) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        backward(models[0], step)
        optimizers[0].step()
        models[1].zero_grad()
        tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(step))
        scaler.scale(nn.functional.cross_entropy(models[1](tokens), tokens)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)

    before = copy.deepcopy(optimizers[1].state_dict()["state"])
    weights = copy.deepcopy(models[1].state_dict())
    backward(models[1], 0)
    models[1].head.bias.grad[0] = float("inf")
    scaler.step(optimizers[1])
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(v, weights[k]) for k, v in models[1].state_dict().items())
    for i, state in optimizers[1].state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state[key], before[i][key])


def test_dcp_state_dict_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = build()
    optimizer = adamw(model)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = copy.deepcopy(model)
    fresh = adamw(resumed)
    set_optimizer_state_dict(resumed, fresh, saved)
    for step in range(5, 14):
        for m, o in ((model, optimizer), (resumed, fresh)):
            backward(m, step)
            o.step()
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_a_copy_goes_on_alike():
    model = build()
    optimizer = adamw(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        backward(m, 3)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_parameters_without_a_gradient_are_left_alone():
    model = build()
    optimizer = adamw(model)
    backward(model, 0)
    model[1].weight.grad = None
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1].weight, before) and not optimizer.state[model[1].weight]


def test_gradient_with_other_strides():
    a, b = build(), build()
    optimizers = [adamw(a), adamw(b)]
    for m in (a, b):
        backward(m, 0)
    b[1].weight.grad = b[1].weight.grad.T.contiguous().T
    for o in optimizers:
        o.step()
    assert torch.equal(a[1].weight, b[1].weight)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"rank": 49}, r"rank must be at most 48 for 1.weight of shape \(96, 48\), got 49"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"proj_type": "full"}, "proj_type must be one of std, reverse_std, left, right, short-moments, got 'full'"),
        ({"subspace": "pca"}, "subspace must be one of randomized, svd, .*got 'pca'"),
        ({"moments": "drop"}, "moments must be one of keep, reset, rotate, .*got 'drop'"),
        ({"update_proj_gap": 0}, "update_proj_gap must be an integer of at least 1, got 0"),
        ({"lr": -1.0}, "lr must be a number of at least 0 or a 0-dim tensor, got -1.0"),
        ({"options": {"betas": (0.9, 1.0)}}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"options": {"nonfinite": "ignore"}}, "nonfinite must be 'skip' or 'raise', got 'ignore'"),
        ({"gap": 3}, "keys of the low-rank group must be among .*, got gap"),
    ],
)
def test_bad_arguments(keys, message):
    with pytest.raises(ValueError, match=message):
        adamw(build(), **keys)


@pytest.mark.parametrize(
    "weight, message", [(torch.zeros(4, 6, dtype=torch.float64), "weight must be float32, bfloat16 or float16, got torch.float64")]
)
@pytest.mark.parametrize("keys", [{}, {"rank": 2}], ids=["plain", "low-rank"])
def test_a_weight_that_cannot_be_kept(weight, message, keys):
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [("weight", nn.Parameter(weight))], **keys}])


def test_a_refused_group_is_not_added():
    optimizer = adamw(build())
    with pytest.raises(ValueError, match="must have two or more dimensions"):
        optimizer.add_param_group({"params": [("bias", nn.Parameter(torch.zeros(4)))], "rank": 2})
    assert len(optimizer.param_groups) == 2


def test_state_of_another_model_is_refused():
    model = build()
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()
    other = GaLoreAdamW(
        param_groups(
            nn.Sequential(
                nn.Embedding(9, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 9, bias=True)
            ),
            rank=8,
            target_modules=["1", "3"],
        )
    )
    with pytest.raises(ValueError, match="does not fit a parameter of shape"):
        other.load_state_dict(optimizer.state_dict())


def names(group):
    return [name for name, _ in group["params"]]


def test_param_groups_leaves_heads_embeddings_and_norms_plain():
    plain, low_rank = param_groups(build(), rank=8, plain={"lr": 1.0})
    assert names(low_rank) == ["1.weight", "3.weight"] and low_rank["rank"] == 8
    assert names(plain) == ["0.weight", "1.bias", "3.bias", "4.weight", "4.bias", "head.weight", "head.bias"]
    assert plain["lr"] == 1.0


def test_param_groups_of_tied_and_frozen_weights():
    model = build()
    model[3] = nn.Linear(48, VOCAB)
    model[3].weight = model[0].weight
    model[1].bias.requires_grad = False
    plain, low_rank = param_groups(model, rank=8)
    assert names(low_rank) == ["1.weight"] and "1.bias" not in names(plain)
    with pytest.raises(ValueError, match="no trainable linear layer whose name contains one of attention"):
        param_groups(model, rank=8, target_modules=["attention"])
    with pytest.raises(ValueError, match="no trainable linear layer"):
        param_groups(nn.Embedding(4, 4))
