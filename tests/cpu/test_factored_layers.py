"""Linear layers that are low-rank plus sparse: their products, gradients and memory, and models made of them."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.nn import ChannelSparseLinear, FactoredLinear, SparseLowRankLinear, factored, factorize_model, merge_factors
from lowrank_sys.optim import GaLoreAdamW, param_groups

IDS = torch.arange(40).reshape(2, 20)
LAYERS = {"entries": SparseLowRankLinear, "channels": ChannelSparseLinear}
EACH = pytest.mark.parametrize("form", LAYERS)


def layer(form, n=40, m=24, rank=5, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = LAYERS[form](n, m, rank, bias, dtype=dtype, density=0.2, **options)
    with torch.no_grad():
        made.B.normal_()
    return made


def dense_in_fp64(made, factors):
    """W from the factors' copies in fp64, in plain indexing, as the definitions say."""
    b, a, values = factors
    if isinstance(made, SparseLowRankLinear):
        rows = torch.arange(made.out_features)[:, None].expand(values.shape)
        return torch.index_put(made.scale * b @ a, (rows, made.columns.long()), values, accumulate=True)
    selection = torch.eye(made.in_features, dtype=torch.float64)[made.columns.long()]
    return made.scale * b @ a + (1 - made.scale) * values @ selection


@pytest.mark.parametrize("rows", [5, 1 << 20])
@pytest.mark.parametrize("bias", [True, False])
@EACH
def test_outputs_and_gradients_are_those_of_fp64(form, bias, rows, monkeypatch):
    monkeypatch.setitem(factored.MOST, "cpu", rows * 40)
    made, x = layer(form, bias=bias), torch.randn(3, 7, 40, requires_grad=True)
    factors = [p.detach().double().requires_grad_() for p in (made.B, made.A, made.values)]
    biases = [made.bias.detach().double().requires_grad_()] if bias else []
    wide = x.detach().double().requires_grad_()
    want = nn.functional.linear(wide, dense_in_fp64(made, factors), *biases)
    y, dy = made(x), torch.randn(3, 7, 24)
    y.backward(dy)
    want.backward(dy.double())
    pairs = [(y, want), (x.grad, wide.grad)]
    pairs += [(p.grad, f.grad) for p, f in zip((made.B, made.A, made.values, made.bias), [*factors, *biases])]
    for got, exact in pairs:
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.dense().double(), dense_in_fp64(made, factors).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH
def test_low_precision_and_autocast(form, dtype, monkeypatch):
    """Errors are those of operands in this type, some of which pass through it twice."""
    monkeypatch.setitem(factored.MOST, "cpu", 5 * 40)
    made, x = layer(form), torch.randn(9, 40)
    x.requires_grad_()
    exact = made(x)
    exact.square().mean().backward()
    wanted = [x.grad, *(p.grad for p in made.parameters())]
    low = copy.deepcopy(made).to(dtype)
    assert low.columns.dtype == torch.int32
    with torch.autocast("cpu", dtype):
        mixed = copy.deepcopy(made)
        own = x.detach().clone().requires_grad_()
        y = mixed(own)
    assert y.dtype == dtype
    for each, given in ((low, x.detach().to(dtype).requires_grad_()), (mixed, own)):
        each.zero_grad()
        out = each(given) if each is low else y
        assert out.dtype == dtype
        out.float().square().mean().backward()
        got = [given.grad, *(p.grad for p in each.parameters())]
        for g, w, p in zip(got, wanted, [given, *each.parameters()]):
            assert g.dtype == p.dtype
            assert (g.float() - w).norm() <= 8 * torch.finfo(dtype).eps * w.norm()


@EACH
def test_nothing_of_the_weights_size_is_kept_or_made(form, monkeypatch):
    """For backward there are x, the factors, the values and the INT32 columns. While it runs there are 8 rows of W at most."""
    size, t = 256, 4
    monkeypatch.setitem(factored.MOST, "cpu", 8 * size)
    made, x = LAYERS[form](size, size, 4, False, density=0.02), torch.randn(t, size, requires_grad=True)
    saved = []
    with LiveStorages() as live:
        before = live.bytes
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            y = made(x)
        y.sum().backward()
        peak = live.peak - before
    known = {p.data_ptr() for p in (x, made.B, made.A, made.values, made.columns)}
    assert {tensor.data_ptr() for tensor in saved} == known
    assert sum(p.grad.nbytes for p in (x, *made.parameters())) < peak < size * size * 4 / 4


def test_stored_bytes():
    """A layer in bf16: factors, values, and 4 bytes for where each value is."""
    made = SparseLowRankLinear(200, 100, 8, False, dtype=torch.bfloat16, density=0.05)
    stored = sum(t.nbytes for t in made.state_dict().values())
    assert stored == 2 * 8 * (200 + 100) + (2 + 4) * 100 * 10


def test_the_support_is_random_and_fixed():
    first, again, other = (
        SparseLowRankLinear(300, 50, 4, density=0.03, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    columns = first.columns
    assert columns.shape == (50, 9) and columns.dtype == torch.int32
    assert torch.equal(columns, again.columns) and not torch.equal(columns, other.columns)
    assert (columns[:, 1:] > columns[:, :-1]).all() and 0 <= columns.min() and columns.max() < 300
    # 450 entries in 300 columns, 1.5 each: the chi-square of counts that are uniform is 299 +- 24.
    counts = torch.bincount(columns.reshape(-1), minlength=300)
    assert abs(((counts - 1.5) ** 2 / 1.5).sum() - 299) < 6 * 24
    first.reset_parameters()
    assert torch.equal(columns, first.columns)


def test_it_is_drawn_as_the_authors_do():
    made = SparseLowRankLinear(400, 100, 8, density=0.03, alpha=32.0)
    assert made.scale == 4.0 and not made.B.any()
    for tensor in (made.A, made.values, made.bias):
        assert 0.9 < tensor.abs().max() * math.sqrt(400) <= 1
    torch.testing.assert_close((made.dense() != 0).float().mean().item(), 0.03)


def test_channels_are_the_dominant_part_and_the_largest_columns_of_the_rest():
    made, weight = layer("channels", gamma=0.7), torch.randn(24, 40)
    made.take_apart_(weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    low, rest = (u[:, keep] * s[keep] @ vh[keep] for keep in (slice(5), slice(5, None)))
    columns = sorted(range(40), key=lambda j: -rest[:, j].norm())[:8]
    torch.testing.assert_close((made.B @ made.A).double(), low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.B.T @ made.B, made.A @ made.A.T, rtol=1e-4, atol=1e-4)
    assert made.columns.tolist() == sorted(columns)
    torch.testing.assert_close(made.values.double(), rest[:, sorted(columns)], rtol=1e-4, atol=1e-4)
    want = 0.7 * low
    want[:, columns] += 0.3 * rest[:, columns]
    torch.testing.assert_close(made.dense().double(), want, rtol=1e-4, atol=1e-4)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, use_cache=False), dtype=dtype)


@EACH
def test_a_model_to_factors_and_back(form):
    model = factorize_model(llama(), rank=8, form=form)
    made = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    assert len(made) == 14 and all(type(module) is LAYERS[form] for module in made)
    assert type(model.lm_head) is nn.Linear
    fewer = sum(p.numel() for p in model.parameters())
    logits = model(input_ids=IDS).logits
    other = factorize_model(llama(), rank=8, form=form)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(input_ids=IDS).logits, logits)
    assert merge_factors(model) is model
    assert fewer < 0.7 * sum(p.numel() for p in model.parameters())
    assert not [name for name, _ in model.named_parameters() if name.endswith((".A", ".B"))]
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@EACH
def test_it_learns(form):
    model = factorize_model(llama(), rank=8, form=form, density=0.1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(15):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_that_target_modules_leave_out_still_train_in_a_subspace():
    model = factorize_model(llama(), rank=8, target_modules=["mlp"])
    groups = param_groups(model, rank=8)
    plain, low = groups
    assert {name.split(".")[-2] for name, _ in low["params"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(name.endswith(".values") for name, _ in plain["params"]) == 6
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert sum(name.endswith(".B") and p.any().item() for name, p in model.named_parameters()) == 6


@EACH
def test_a_frozen_layer_keeps_no_input(form):
    made, x = layer(form, bias=False).requires_grad_(False), torch.randn(4, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        y = made(x)
    y.sum().backward()
    assert x.data_ptr() not in saved and len(saved) == 4
    torch.testing.assert_close(x.grad, made.dense().sum(0).expand(4, 40), rtol=1e-4, atol=1e-5)
    assert made.B.grad is None


@EACH
def test_one_factor_alone_trains(form):
    made, x = layer(form), torch.randn(4, 40)
    whole = torch.autograd.grad(made(x).square().sum(), list(made.parameters()))
    made.B.requires_grad_(False)
    made(x).square().sum().backward()
    assert made.B.grad is None
    for param, grad in zip((made.A, made.values, made.bias), whole[1:]):
        torch.testing.assert_close(param.grad, grad)


REFUSED = {
    "form": (lambda: factorize_model(llama(), 8, "rows"), "form must be one of entries, channels, got 'rows'"),
    "rank": (lambda: factorize_model(llama(), 0), "rank must be an integer of at least 1, got 0"),
    "wide": (lambda: factorize_model(llama(), 65), "model has no linear layer to factorize at rank 65, got LlamaForCausalLM"),
    "density": (lambda: factorize_model(llama(), 8, density=0), "density must be above 0 and below 1, got 0"),
    "gamma": (lambda: ChannelSparseLinear(8, 8, 2, gamma=1.0), "gamma must be above 0 and below 1, got 1.0"),
    "target": (
        lambda: factorize_model(llama(), 8, target_modules=["mlp", "attention"]),
        "target_modules: no linear layer to factorize has 'attention' in its name",
    ),
    "alpha": (lambda: SparseLowRankLinear(8, 8, 2, alpha=0), "alpha must be above 0 and finite, got 0"),
    "own rank": (lambda: SparseLowRankLinear(8, 6, 7), "rank must be an integer from 1 to 6, got 7"),
    "dtype": (lambda: ChannelSparseLinear(8, 6, 2, dtype=torch.int8), "dtype must be float32, bfloat16 or float16, got torch.int8"),
    "merge": (lambda: merge_factors(llama()), "model has no factored layers, got LlamaForCausalLM"),
    "wide model": (lambda: factorize_model(llama().double(), 8), "must be float32, bfloat16 or float16, got torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_an_entry_outside_of_the_weight_is_an_error():
    made = layer("entries")
    made.columns[3, 1] = 40
    with pytest.raises(RuntimeError, match=r"scatter_add_product: columns\[3, 1\] must be in \[\d+, 40\), got 40"):
        made(torch.randn(2, 40))
