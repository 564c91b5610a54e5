"""Layers of ProjectedLinear: other types, copies, casts, compilation, and what is refused."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from projected_model import (
    BOTH,
    CLOSE,
    EPS,
    GAP,
    LR,
    RANK,
    VOCAB,
    backward,
    batch,
    galore,
    kept_bytes,
    layers,
    llama,
    projected,
    train,
)
from small_model import assert_same
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lowrank_sys.nn import QuantLinear, dequantize_model, project_model, quantize_model, unproject_model
from lowrank_sys.optim import Accumulate, FiraAdamW, GaLoreAdamW, QGaLoreAdamW8bit, param_groups


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=32, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def coefficients(model):
    return {name: p for name, p in model.named_parameters() if "low_rank_gradients" in name}


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_activation_checkpointing(side, reentrant):
    (model, first), (other, second) = projected(side, share=True), projected(side, share=True)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    other.train()
    assert torch.equal(train(model, first, range(8), 2), train(other, second, range(8), 2))
    assert_same(model, other)


@BOTH
def test_autocast(side):
    """The products see what autocast gives an ordinary layer: R is that of the optimizer-side mode to bf16's rounding."""
    (model, first), other = projected(side), llama()
    second = galore(other, "accumulate", proj_type=side)
    for m in (model, other):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(input_ids=batch(0), labels=batch(0)).loss
        loss.backward()
    for (name, ours), theirs in zip(coefficients(model).items(), coefficients(other).values(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm(), name
    layer = next(iter(layers(model).values()))
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(layer, 20) - 2 * layer.weight.numel()  # a bf16 copy of W, as in any layer
    first.step()
    second.step()
    assert kept == 2 * 20 * (RANK + layer.in_features if side == "right" else layer.in_features)


def test_compile_is_one_graph():
    """A step in which layers owe a sketch has a graph of its own: those run eagerly."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small = (llama(num_hidden_layers=1) for _ in range(2))
    (model, first), (other, second) = (projected("auto", model, share=True, update_proj_gap=40) for model in small)
    compiled, eager = torch.compile(other, fullgraph=True, backend="aot_eager"), 0
    losses = []
    for step in range(9):
        eager += bool(second.gradients.announced())
        with torch.compiler.set_stance("force_eager" if second.gradients.announced() else "default"):
            losses += train(other, second, [step], forward=compiled).tolist()
    assert 4 <= eager < 9 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(torch.tensor(losses), train(model, first, range(9)), **CLOSE)


@BOTH
def test_compile_of_a_layer_that_sketches(side):
    """One graph too, with the layer twice in it."""
    torch._dynamo.reset()
    (model, first), (other, second) = projected(side, Twice()), projected(side, Twice())
    assert first.gradients.announced()
    compiled = torch.compile(lambda ids: model(ids, ids).loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        compiled(batch(step)).backward()
        first.step()
        first.zero_grad()
    train(other, second, range(3))
    assert_same(model, other, **CLOSE)


class Output(NamedTuple):
    loss: torch.Tensor


class Twice(nn.Module):
    def __init__(self, cls=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.head = nn.Embedding(VOCAB, 24), cls(24, 24), nn.Linear(24, VOCAB)

    def forward(self, input_ids, labels=None):
        y = self.one(self.one(self.embed(input_ids)).relu())
        return Output(nn.functional.cross_entropy(self.head(y).flatten(0, 1), labels.flatten()))


@BOTH
def test_a_layer_that_is_used_twice(side):
    """R and the sketch add up, and with the bias it is an ordinary layer."""
    model, other = Twice(), Twice()
    model, optimizer = projected(side, model)
    theirs = galore(other, "accumulate", proj_type=side)
    torch.testing.assert_close(train(model, optimizer, range(16), 2), train(other, theirs, range(16), 2), **CLOSE)
    assert_same(model, other, **CLOSE)


@BOTH
def test_a_transposed_weight(side):
    """transformers' Conv1D (in, out): the side that keeps X B is the other one."""
    model, optimizer = projected(side, gpt2())
    assert {type(layer).__name__ for layer in layers(model).values()} == {"ProjectedConv1D"}
    other = gpt2()
    losses = train(model, optimizer, range(12))
    torch.testing.assert_close(losses, train(other, galore(other, "accumulate", proj_type=side), range(12)), **CLOSE)
    layer, rows = model.transformer.h[0].mlp.c_proj, 20
    assert layer.projection.omega is None
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
        layer(torch.randn(rows, 128))
    own = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.projection.basis)}
    found = [tuple(t.shape) for key, t in kept.items() if key not in own]
    assert found == [(rows, RANK) if side == "left" else (rows, 128)]


def codes_of(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("codes")]


@pytest.mark.parametrize("cls", [GaLoreAdamW, QGaLoreAdamW8bit], ids=["galore", "q-galore"])
@BOTH
def test_int8_weights(side, cls):
    """R is the optimizer-side one to rounding; so is a step, but for codes that are rounded the other way: there the runs part."""
    found = []
    for project in (True, False):
        model = quantize_model(llama(), group_size=32)
        if project:
            model, optimizer = projected(side, model, cls)
            assert {type(layer).__name__ for layer in layers(model).values()} == {"ProjectedQuantLinear"}
            assert all(isinstance(layer, QuantLinear) for layer in layers(model).values())
        else:
            optimizer = galore(model, "accumulate", cls, proj_type=side)
        backward(model, 0)
        grads = [p.grad for p in coefficients(model).values()]
        optimizer.zero_grad()
        losses = train(model, optimizer, [0]).tolist()
        codes = codes_of(model)
        found.append((grads, codes, torch.tensor(losses + train(model, optimizer, range(1, 12)).tolist())))
    (ours, codes, losses), (theirs, others, other) = found
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(losses, other, atol=5e-3, rtol=0)
    for before, mine, his in zip(codes_of(quantize_model(llama(), group_size=32)), codes, others, strict=True):
        assert (mine != his).sum() < 0.02 * (mine != before).sum()


@BOTH
def test_an_int4_basis(side):
    model, optimizer = projected(side, quant=True, quant_group_size=32)
    other = llama()
    theirs = galore(other, "accumulate", proj_type=side, quant=True, quant_group_size=32)
    torch.testing.assert_close(train(model, optimizer, range(12)), train(other, theirs, range(12)), atol=1e-3, rtol=0)


def test_bf16_weights_and_accumulators():
    model, optimizer = projected("auto", llama().to(torch.bfloat16), per_layer=Accumulate(torch.bfloat16))
    losses = train(model, optimizer, [0] * 20, 2)
    backward(model, 0)
    assert {p.grad.dtype for p in coefficients(model).values()} == {torch.bfloat16}
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_afterwards(dtype):
    model, optimizer = projected()
    model.to(dtype).float()
    for p in coefficients(model).values():
        assert p.dtype == torch.float32 and p.untyped_storage().nbytes() == 4 and p.requires_grad
    train(model, optimizer, range(6), 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), llama().to(dtype).float().get_parameter(name))


def test_what_backward_needs_goes_with_a_layer():
    model, optimizer = projected()
    assert optimizer.gradients.announced()
    for layer in layers(model).values():
        on, due = layer.projection, layer.projection.omega is not None
        shape = on.sketch.shape if due else None
        on.to(torch.device("meta"))
        assert all(tensor.is_meta for tensor in (*on.basis, *((on.omega, on.sketch) if due else ())))
        assert not due or (on.sketch.shape == shape and on.sketch.requires_grad)
    for p in coefficients(model.to("meta")).values():
        assert p.is_meta and p.requires_grad


def test_the_coefficient():
    """One zero of autograd's: in parameters(), in the groups, frozen and unfrozen with its layer, written by nothing."""
    model, optimizer = projected()
    found = coefficients(model)
    assert len(found) == len(layers(model)) == 14
    for name, p in found.items():
        layer = model.get_submodule(name.removesuffix(".low_rank_gradients.weight"))
        assert p.requires_grad and p.untyped_storage().nbytes() == 4 and p.shape == (layer.out_features, RANK)
        assert any(q is p for group in optimizer.param_groups for q in group["params"]) and not layer.weight.requires_grad
        with torch.no_grad():
            p.add_(1)
        assert (p == 0).all()
    full = sum(4 * p.numel() for p in found.values())
    assert optimizer.gradients.memory()["accumulators"] >= full
    layer = model.model.layers[0].mlp.up_proj
    layer.requires_grad_(False)
    before = layer.weight.clone()
    train(model, optimizer, range(2))
    assert torch.equal(layer.weight, before)
    layer.low_rank_gradients.requires_grad_(True)
    train(model, optimizer, range(2))
    assert not torch.equal(layer.weight, before)


def test_copies():
    """A copied pair goes on by itself; an average and a pickled model are models to evaluate."""
    model, optimizer = projected()
    train(model, optimizer, range(3))
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    other, theirs = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, range(3, 9)), train(other, theirs, range(3, 9)))
    assert_same(model, other)
    average.update_parameters(model)
    average.update_parameters(model)
    with torch.no_grad():
        assert average(input_ids=batch(0)).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="has no basis before its optimizer is built"):
        average(input_ids=batch(0))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert len(layers(loaded)) == 14
    assert_same(model, loaded)
    train(loaded, galore(loaded), range(2))


def test_unproject_model_and_release():
    model, optimizer = projected("auto")
    train(model, optimizer, range(3))
    optimizer.release()
    with pytest.raises(RuntimeError, match="no basis"):
        backward(model, 0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(llama().parameters()))
    assert unproject_model(model) is model and not layers(model) and not coefficients(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in llama().named_parameters()]
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    train(model, galore(model), range(2))
    with pytest.raises(ValueError, match="model has no projected layers"):
        unproject_model(model)


def test_a_newer_optimizer_serves_the_layers():
    model, older = projected()
    newer = galore(model, update_proj_gap=3)
    with pytest.raises(RuntimeError, match="no longer this optimizer's"):
        older.step()
    other, optimizer = projected(update_proj_gap=3)
    assert torch.equal(train(model, newer, range(6)), train(other, optimizer, range(6)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes as nn.Linear does."""


def test_what_computes_otherwise_is_projected_by_its_optimizer():
    """So it trains as it did; a subclass that adds nothing is converted, with its hooks."""
    for cls, converts in ((Scaled, 0), (Named, 1)):
        model, other = Twice(cls), Twice(cls)
        torch.manual_seed(1)
        model.embed = nn.Sequential(model.embed, nn.Linear(24, 24))
        torch.manual_seed(1)
        other.embed = nn.Sequential(other.embed, nn.Linear(24, 24))
        seen = []
        model.one.register_forward_hook(lambda *args: seen.append(1))
        model, optimizer = projected("left", model)
        assert len(layers(model)) == 1 + converts and isinstance(model.one, cls)
        groups = param_groups(other, RANK, update_proj_gap=GAP, proj_type="left")
        if not converts:  # what its optimizer projects is a group of its own, the first, on the side of param_groups
            low = groups[1]
            groups[1:] = [{**low, "params": low["params"][1:], "proj_type": "std"}, {**low, "params": low["params"][:1]}]
        theirs = GaLoreAdamW(groups, lr=LR, eps=EPS, weight_decay=0.1, per_layer="accumulate")
        torch.testing.assert_close(train(model, optimizer, range(8)), train(other, theirs, range(8)), **CLOSE)
        assert seen
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    attention["b"].forward = attention["b"].forward  # as those who wrap layers do
    assert list(layers(project_model(attention, 4))) == ["c"]


def tied():
    model = llama()
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def frozen():
    return llama().requires_grad_(False)


REFUSED = {
    "shared": (lambda: project_model(tied(), RANK), "q_proj.weight must be of one module, got .*q_proj, .*k_proj"),
    "twice": (lambda: project_model(project_model(llama(), RANK), RANK), "is projected already: call unproject_model first"),
    "served": (lambda: projected(model=galore(llama(), "accumulate").gradients.model), "q_proj has the low-rank gradients of"),
    "frozen": (lambda: project_model(frozen(), RANK), "no trainable linear layer to project at rank 8, got LlamaForCausalLM"),
    "rank": (lambda: project_model(llama(), 0), "rank must be an integer of at least 1, got 0"),
    "wide rank": (lambda: project_model(llama(), 64), "no trainable linear layer to project at rank 64"),
    "side": (lambda: project_model(llama(), RANK, "up"), "side must be one of left, right, auto, got 'up'"),
    "tokens": (lambda: project_model(llama(), RANK, tokens=0.5), "tokens must be an integer of at least 1, got 0.5"),
    "a layer": (lambda: project_model(nn.Linear(16, 16), RANK), "model must be a module around its linear layers, got Linear"),
    "float64": (lambda: project_model(llama().double(), RANK), "must be float32, bfloat16 or float16, got torch.float64"),
    "another rank": (lambda: param_groups(project_model(llama(), RANK), rank=16), "rank must be 8, .* got 16"),
    "proj_type": (lambda: param_groups(project_model(llama(), RANK), RANK, proj_type="std"), "proj_type must be left out .*'std'"),
    "targets": (
        lambda: param_groups(project_model(llama(), RANK), RANK, target_modules=["mlp"]),
        "target_modules must name every projected layer, got none for .*q_proj",
    ),
    "refresh": (lambda: projected(refresh="now"), "refresh must be 'next' with per_layer='accumulate', got 'now'"),
    "svd": (lambda: projected(subspace="svd"), "subspace must be .* with refresh='next', got 'svd'"),
    "in_backward": (lambda: projected(per_layer="in_backward"), "per_layer must be None, accumulate or .*'in_backward'"),
    "fira": (lambda: projected(cls=FiraAdamW), "needs a rule that can start from R, got FiraAdamW"),
    "dequantize": (
        lambda: dequantize_model(project_model(quantize_model(llama(), group_size=32), RANK)),
        "model has projected layers: call unproject_model first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_refused_in_forward():
    model = project_model(llama(), RANK)
    with pytest.raises(RuntimeError, match="has no basis before its optimizer is built: give param_groups"):
        backward(model, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch(0)).logits, llama()(input_ids=batch(0)).logits)
    optimizer = galore(model)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="the weight of a ProjectedLinear must not require a gradient"):
        backward(model, 0)
    for layer in layers(model).values():
        layer.weight.requires_grad_(False)
    train(model, optimizer, range(2))


def test_nothing_is_converted_where_something_is_refused():
    model = tied()
    with pytest.raises(ValueError, match="must be of one module"):
        project_model(model, RANK)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())
