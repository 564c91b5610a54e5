"""ProjectedLinear: backward gives R and no G, and everything around it sees an ordinary gradient."""

import copy
import io
import math
from typing import NamedTuple

import pytest
import torch
from lanes import usual
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_sys.nn import ProjectedLinear, QuantLinear, dequantize_model, project_model, quantize_model, unproject_model
from lowrank_sys.optim import Accumulate, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit, param_groups

RANK, GAP, LR, EPS = 8, 4, 1e-2, 1e-3
BATCH, LENGTH, VOCAB = 4, 17, 64  # 68 tokens: a size that no weight has
# Two orders of summation of the same numbers: rounding of a loss near 4, and of weights below 1 that steps of Adam, with an eps far
# above the gradients' rounding, carry on.
CLOSE = {"atol": 1e-5, "rtol": 0}
BOTH = pytest.mark.parametrize("side", ["left", "right"])


def llama(seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "use_cache": False, **config}))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=32, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def galore(model, per_layer=None, cls=GaLoreAdamW, lr=LR, **keys):
    groups = param_groups(model, rank=RANK, **{"update_proj_gap": GAP, **keys})
    return cls(groups, lr=lr, eps=EPS, weight_decay=0.1, per_layer=per_layer)


def projected(side="right", model=None, cls=GaLoreAdamW, per_layer=None, share=False, **keys):
    model = project_model(llama() if model is None else model, RANK, side, share=share)
    return model, galore(model, per_layer, cls, **keys)


def batch(step):
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step % 4))


def backward(model, step, micro=1):
    """The loss."""
    losses = [model(input_ids=ids, labels=ids).loss / micro for ids in batch(step).chunk(micro)]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses)


def train(model, optimizer, steps, micro=1, clip=None, forward=None):
    """The losses."""
    losses = []
    for step in steps:
        losses.append(backward(model if forward is None else forward, step, micro))
        if clip is not None:
            clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def clip_by_torch(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def clip_by_optimizer(model, optimizer):
    optimizer.clip_grad_norm_(0.3)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ProjectedLinear)}


def coefficients(model):
    return {name: p for name, p in model.named_parameters() if "low_rank_gradients" in name}


def assert_same(a, b, **close):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("clipped", usual([False], True), ids=["", "clipped"])
@pytest.mark.parametrize("keys", usual([{}], {"moments": "rotate"}), ids=str)
@BOTH
def test_the_loss_curve_of_optimizer_side_galore(side, keys, clipped):
    """Over 36 steps and nine refreshes a matrix, on whole gradients and on accumulated ones, with the same bases."""
    model, optimizer = projected(side, **keys)
    losses = train(model, optimizer, range(36), clip=clip_by_torch if clipped else None)
    assert optimizer.refreshes().keys() == {f"{name}.weight" for name in layers(model)}
    for per_layer in (None, "accumulate"):
        other = llama()
        theirs = galore(other, per_layer, proj_type=side, refresh="next", **keys)
        torch.testing.assert_close(losses, train(other, theirs, range(36), clip=clip_by_optimizer if clipped else None), **CLOSE)
        for (name, layer), p in zip(layers(model).items(), theirs.param_groups[1]["params"]):
            ours, basis = (o.state[w]["basis"] for o, w in ((optimizer, layer.weight), (theirs, p)))
            assert (ours.T @ basis).square().sum() > RANK - 1e-3, name  # one subspace: random ones share 2 of 8
            moved = (p - llama().get_parameter(f"{name}.weight")).abs().max()
            assert (p - layer.weight).abs().max() < 1e-5 < 1e-3 < moved, name


def test_it_learns():
    model, optimizer = projected("auto")
    same = [0] * 30
    losses = train(model, optimizer, same)
    assert losses[-1] < 0.5 * losses[0] and abs(losses[0] - math.log(VOCAB)) < 0.1


class Made(TorchDispatchMode):
    """Shapes of all that is allocated, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = {id(a.untyped_storage()._cdata) and a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in taken:
                self.shapes.append(tuple(sorted(tensor.shape)))
        return made


def made_in_backward(model, step):
    loss = model(input_ids=batch(step), labels=batch(step)).loss
    with Made() as made:
        loss.backward()
    return made.shapes


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@BOTH
def test_no_gradient_of_a_weight_is_made(side, int8):
    """Not in a refresh either, which has but a sketch."""
    # sizes of weights that no activation has
    sizes = {tuple(sorted(layer.weight.shape)) for layer in layers(project_model(llama(), RANK)).values()}
    assert sizes <= set(made_in_backward(llama(), 0))  # as it would be seen
    model = llama()
    if int8:
        quantize_model(model, group_size=32)
    model, optimizer = projected(side, model)
    due = 0
    for step in range(8):
        due += len(optimizer.gradients.announced())
        assert not sizes & set(made_in_backward(model, step))
        assert all(layer.weight.grad is None for layer in layers(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert due >= 2 * len(layers(model))  # every matrix was refreshed twice


def kept_bytes(layer, rows):
    """Bytes of distinct storages that a layer's forward keeps for backward, beside parameters and the basis."""
    own = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers(), *layer.projection.basis)}
    own |= {t.untyped_storage()._cdata for t in (layer.projection.omega,) if t is not None}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
        layer(torch.randn(2, rows // 2, layer.weight.shape[1], requires_grad=True))
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@BOTH
def test_what_a_layer_keeps_for_backward(side, int8):
    """On the right r / in of its input, and the input too where a basis is due; on the left the input."""
    model, rows = llama(), 20
    if int8:
        quantize_model(model, group_size=32)
    model, optimizer = projected(side, model)
    seen = set()
    for step in range(4):
        for layer in layers(model).values():
            whole, narrow, due = 4 * rows * layer.in_features, 4 * rows * RANK, layer.projection.omega is not None
            assert kept_bytes(layer, rows) == (whole if side == "left" else narrow + whole * due)
            seen.add(due)
        train(model, optimizer, [step])
    assert seen == {True, False}


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit], ids=["galore", "galore8bit"])
@BOTH
def test_resume_is_exact_to_the_bit(side, cls):
    """From any step of a refresh gap, and from the checkpoint of a model that is not projected."""
    whole, optimizer = projected(side, cls=cls)
    for step in range(9):
        train(whole, optimizer, [step])
        if step not in (0, 4, 6):
            continue
        file = io.BytesIO()
        torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, other = projected(side, model=llama(seed=1), cls=cls)
        train(model, other, [99])
        model.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        again = copy.deepcopy(saved)  # what goes on must not have changed it
        straight, theirs = copy.deepcopy((whole, optimizer))
        assert torch.equal(train(model, other, range(step + 1, 12)), train(straight, theirs, range(step + 1, 12)))
        assert_same(model, straight)
        assert all(torch.equal(v, saved["model"][k]) for k, v in again["model"].items())
        plain = llama(seed=1)
        plain.load_state_dict(saved["model"])
        galore(plain, "accumulate", cls, proj_type=side).load_state_dict(saved["optimizer"])


def test_a_checkpoint_has_neither_basis_nor_coefficient(tmp_path):
    from transformers import LlamaForCausalLM

    model, optimizer = projected("auto")
    train(model, optimizer, range(3))
    assert list(model.state_dict()) == list(llama().state_dict())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    model.load_state_dict(loaded.state_dict(), strict=True)
    count = sum(1 for group in optimizer.param_groups for _ in group["params"]) - len(layers(model))
    assert sum(len(group["params"]) for group in optimizer.state_dict()["param_groups"]) == count
    assert [n for n, _ in model.named_parameters()][: len(list(llama().parameters()))] == [n for n, _ in llama().named_parameters()]


@BOTH
def test_four_micro_batches_are_one_batch(side):
    (one, first), (four, second) = projected(side), projected(side)
    losses = [train(one, first, range(12), 1, clip_by_torch), train(four, second, range(12), 4, clip_by_torch)]
    torch.testing.assert_close(*losses, **CLOSE)
    assert_same(one, four, atol=1e-4, rtol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["model", "optimizer"])
@BOTH
def test_zero_grad(side, of, set_to_none):
    """Between the steps, and to throw a micro-batch away: the sketch goes with the gradient."""
    (clean, first), (model, second) = projected(side, update_proj_gap=2), projected(side, update_proj_gap=2)
    for step in range(6):
        backward(clean, step)
        backward(model, 100 + step)
        zero = {"model": model, "optimizer": second}[of].zero_grad
        zero(set_to_none=set_to_none)
        backward(model, step)
        first.step()
        second.step()
        first.zero_grad()
        zero(set_to_none=set_to_none)
    assert_same(clean, model)


def test_a_forgotten_zero_grad_is_an_error():
    model, optimizer = projected()
    backward(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after step\(\)"):
        backward(model, 1)
    optimizer.zero_grad()
    train(model, optimizer, [1])


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


def test_grad_scaler():
    losses = []
    for scaled in (False, True):
        model, optimizer = projected()
        scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled), []
        for step in range(10):
            scaler.scale(model(input_ids=batch(step), labels=batch(step)).loss).backward()
            scaler.unscale_(optimizer)
            found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses.append(torch.tensor(found))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


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


def shared(**keys):
    return projected("right", llama(num_key_value_heads=1), share=True, **keys)  # k and v are narrower than q


def families(model):
    for block in model.model.layers:
        yield [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
        yield [block.mlp.gate_proj, block.mlp.up_proj]


@pytest.mark.parametrize("keys", [{}, {"quant": True, "quant_group_size": 32}, {"moments": "rotate"}], ids=str)
def test_layers_that_read_one_input_share_a_basis(keys):
    """Bit for bit, over refreshes; all else is as without: micro-batches add up, a resumed run and a copy are exact."""
    (model, optimizer), (four, other) = shared(**keys), shared(**keys)
    chosen = set()
    for step in range(10):
        train(model, optimizer, [step])
        train(four, other, [step], 4)
        for members in families(model):
            first, *rest = (optimizer.state[layer.weight] for layer in members)
            assert all(torch.equal(state["basis"], first["basis"]) for state in rest)
            chosen.add(first["basis"].float().sum().item())
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            copied = copy.deepcopy((model, optimizer))
    assert len(chosen) >= 3 * 4  # three bases each
    if not keys:  # codes of a basis, and turned moments, part by rounding
        assert_same(model, four, atol=1e-4, rtol=0)
    resumed = shared(**keys)
    resumed[0].load_state_dict(saved[0])
    resumed[1].load_state_dict(saved[1])
    for others in (resumed, copied):
        train(*others, range(6, 10))
        assert_same(model, others[0])


def test_a_shared_basis_is_that_of_all_gradients():
    """Close to the best one for those of q, k and v one over the other, where they stand still."""
    model = project_model(llama(num_key_value_heads=1), RANK, "right", share=True)
    optimizer = galore(model, lr=1e-7)
    train(model, optimizer, [0] * 9)
    plain = llama(num_key_value_heads=1)
    plain.load_state_dict(model.state_dict())
    backward(plain, 0)
    names = {module: name for name, module in model.named_modules()}
    for members in families(model):
        grad = torch.cat([plain.get_parameter(f"{names[layer]}.weight").grad for layer in members])
        best = torch.linalg.svdvals(grad)[:RANK].square().sum()
        energy = (grad @ optimizer.state[members[0].weight]["basis"]).square().sum()
        assert energy > 0.95 * best, names[members[0]]


def test_what_layers_that_share_keep_for_backward():
    """One X B for q, k and v, one for gate and up; and each its own where they were trained apart."""
    from lowrank_sys.bench.projected import kept_bytes

    def kept(model):
        return kept_bytes(list(layers(model).values()), lambda: model(input_ids=batch(0), labels=batch(0)).loss)

    model, optimizer = shared(update_proj_gap=100)
    train(model, optimizer, range(5))
    assert not optimizer.gradients.announced()
    one = 4 * batch(0).numel() * RANK
    assert kept(model) == 2 * 4 * one
    members, x = next(families(model)), torch.randn(6, 32)
    for step in range(2):  # one alone, with the same input after the basis has changed
        narrow = members[0].projection.narrow(x, x.dtype)
        torch.testing.assert_close(narrow, x @ optimizer.state[members[0].weight]["basis"])
        for member in members:
            optimizer.state[member.weight]["countdown"].zero_()
        optimizer.gradients.finish(optimizer)
        train(model, optimizer, [step])
    assert kept(model) == 2 * 4 * one
    layer = model.model.layers[0].self_attn.k_proj
    layer.requires_grad_(False)
    train(model, optimizer, range(2))
    layer.low_rank_gradients.requires_grad_(True)
    assert kept(model) == (4 + 6) * one
    train(model, optimizer, range(3))


def test_auto_takes_the_cheaper_side():
    """Bytes by hand: R at 12 an element, the basis and what is kept at 4, for 10 tokens and for 10,000."""
    for tokens in (10, 10_000):
        model = project_model(llama(hidden_size=64, intermediate_size=512), RANK, "auto", tokens=tokens)
        for name, layer in layers(model).items():
            m, n = layer.weight.shape
            right = 12 * m * RANK + 4 * n * RANK + 4 * tokens * RANK
            left = 12 * n * RANK + 4 * m * RANK + 4 * tokens * n
            assert layer.projection.left == (left < right), name
    wide = layers(project_model(llama(hidden_size=64, intermediate_size=512), RANK, "auto", tokens=10))
    assert {name.rpartition(".")[2] for name, layer in wide.items() if layer.projection.left} == {"gate_proj", "up_proj"}


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


def test_transformers_trainer(tmp_path):
    """Unchanged, with micro-batches and clipping."""
    from transformers import Trainer, TrainingArguments

    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        model, optimizer = projected("auto")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            use_cpu=True, max_grad_norm=0.3, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for step in range(6) for row in batch(step)]
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train()
        found.append((model, [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4) and max(found[0][1]) > 0.3
    assert_same(found[0][0], found[1][0], atol=1e-4, rtol=0)
