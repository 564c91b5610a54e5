"""Weights of more than two dimensions: experts train as the matrices they are, convolutions as flat ones."""

import copy
import io

import pytest
import torch
from torch import nn

from lowrank_sys import optim
from lowrank_sys.optim.preset import METHODS

E, M, N, RANK, GAP = 3, 24, 40, 4, 4


def options(method):
    return {"rank": None if method.rank is None else min(RANK, method.rank), "update_proj_gap": GAP, **method.keys}


def gradient(step):
    return torch.randn(E, M, N, generator=torch.Generator().manual_seed(step))


def built(name, params):
    """Over the weights of one layer, for methods that draw layers."""
    method = METHODS[name]
    named = [(f"layers.0.{i}", param) for i, param in enumerate(params)]
    return method.optimizer([{"params": named, **options(method)}], lr=1e-2, weight_decay=0.1, **method.options)


def train(optimizer, params, steps, spoil=()):
    stack, dtype = params[0].dim() == 3, params[0].dtype
    for step in steps:
        for e, p in enumerate(params):
            g = gradient(step).to(dtype)
            if step in spoil:
                g[1, 0, 0] = float("nan")
            p.grad = g if stack else g[e].clone()
        optimizer.step()


def weights():
    return torch.randn(E, M, N, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_batch_trains_as_its_matrices(name, dtype):
    stack = [nn.Parameter(weights().to(dtype))]
    apart = [nn.Parameter(w.clone()) for w in weights().to(dtype)]
    optimizers = built(name, stack), built(name, apart)
    for optimizer, params in zip(optimizers, (stack, apart)):
        train(optimizer, params, range(10), spoil=[6])
    for e, p in enumerate(apart):
        assert torch.equal(stack[0][e], p)
    assert optimizers[0].skipped() == optimizers[1].skipped()
    assert optimizers[0].skipped() > 0 or name == "grass"  # which leaves rows out that are not finite
    state = optimizers[0].state[stack[0]]
    assert all(value.shape[0] == E for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", ["galore", "q-galore", "apollo", "grass", "fira", "ldadam", "scale"])
def test_resume_is_exact(name):
    params = [nn.Parameter(weights())]
    optimizer = built(name, params)
    train(optimizer, params, range(6))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": params[0].detach()}, file)
    train(optimizer, params, range(6, 14))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(saved["weights"])]
    other = built(name, others)
    other.load_state_dict(saved["optimizer"])
    train(other, others, range(6, 14))
    assert torch.equal(params[0], others[0])


def test_a_state_of_other_experts_is_refused():
    params, others = [nn.Parameter(weights())], [nn.Parameter(weights()[:2])]
    optimizer, other = built("galore", params), built("galore", others)
    train(optimizer, params, range(2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="does not fit a parameter of shape"):
        other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["state"] == before["state"]


def test_in_backward_with_clipping():
    stack, apart = [nn.Parameter(weights())], [nn.Parameter(w.clone()) for w in weights()]
    for params in (stack, apart):
        optimizer = optim.GaLoreAdamW(
            [{"params": params, "rank": RANK, "update_proj_gap": GAP}], lr=1e-2, per_layer=optim.InBackward(max_norm=0.5)
        )
        for step in range(6):
            x = gradient(step)
            if params is stack:
                (params[0] * x).sum().backward()
            else:
                sum((p * x[e]).sum() for e, p in enumerate(params)).backward()
            optimizer.step()
    assert all(torch.equal(stack[0][e], p) for e, p in enumerate(apart))


def test_schedules_are_told_by_expert():
    params = [nn.Parameter(weights())]
    optimizer = optim.GaLoreAdamW([{"params": [("experts", params[0])], "rank": RANK, "update_proj_gap": 9}])
    train(optimizer, params, range(1))
    assert list(optimizer.refreshes()) == ["experts[0]", "experts[1]", "experts[2]"]
    assert [found["countdown"] for found in optimizer.refreshes().values()] == [0, 3, 6]
    assert optimizer.memory()["other"] == 0


@pytest.mark.parametrize("name", ["galore", "apollo", "fira", "sinkgd"])
def test_a_convolution_is_one_flat_matrix(name):
    conv = nn.Parameter(torch.randn(24, 6, 3, 3, generator=torch.Generator().manual_seed(1)))
    flat = nn.Parameter(conv.detach().flatten(1).clone())
    for p in (conv, flat):
        optimizer = built(name, [p])
        for step in range(8):
            p.grad = torch.randn(24, 54, generator=torch.Generator().manual_seed(step)).view(p.shape)
            optimizer.step()
    assert torch.equal(conv.detach().flatten(1), flat)


class Experts(nn.Module):
    """Laid out as transformers' mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * N, M))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 2 * N))
        self.down_proj = nn.Parameter(torch.randn(E, M, N))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.experts, self.conv = nn.Linear(M, M), Experts(), nn.Conv1d(M, M, 4)


def test_experts_are_found():
    groups = optim.param_groups(Mixture(), rank=RANK)
    assert [name for name, _ in groups[1]["params"]] == ["q_proj.weight", "experts.gate_up_proj", "experts.down_proj"]
    low = M * M + 3 * E * M * N
    assert groups.share == pytest.approx(low / (low + M + E * 2 * N + M * M * 4 + M))
    chosen = optim.param_groups(Mixture(), rank=RANK, target_modules=["experts"])
    assert [name for name, _ in chosen[1]["params"]] == ["experts.gate_up_proj", "experts.down_proj"]
    with pytest.raises(ValueError, match="rank must be at most 24 for q_proj.weight"):
        optim.param_groups(Mixture(), rank=41)


def test_a_mixture_of_experts_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    groups = optim.param_groups(model, rank=4, update_proj_gap=3)
    assert sum(p.dim() == 3 for _, p in groups[1]["params"]) == 2 and groups.share > 0.7
    optimizer = optim.GaLoreAdamW(groups, lr=1e-2)
    ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_refusals():
    with pytest.raises(ValueError, match="rank must be at most 24 for parameter 0 of shape"):
        optim.GaLoreAdamW([{"params": [nn.Parameter(weights())], "rank": 25}])
    with pytest.raises(ValueError, match="must have two or more dimensions to be in a group with a rank"):
        optim.GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4))], "rank": 1}])
    conv = nn.Parameter(torch.randn(24, 6, 3, 3).to(memory_format=torch.channels_last))
    optimizer = optim.GaLoreAdamW([{"params": [conv], "rank": 4}])
    conv.grad = torch.randn_like(conv)
    with pytest.raises(ValueError, match="a convolution in a group with a rank must be contiguous"):
        optimizer.step()
    assert not optimizer.state[conv]
