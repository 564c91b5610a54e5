"""The loss that is computed in chunks, against torch's on whole logits."""

import importlib
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.nn import causal_lm_loss, chunked_loss

V, D = 101, 24
CHUNKS = [(1000, 1000), (7, 13), (1, 101), (40, 1)]


def inputs(dtype=torch.float32, shape=(3, 11), bias=True):
    torch.manual_seed(0)
    hidden, weight, shift = torch.randn(*shape, D), torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, shape)
    labels.view(-1)[::4] = -100
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, shift)]
    return (*(leaves if bias else (*leaves[:2], None)), labels)


def plain(hidden, weight, bias, labels, reduction="mean"):
    """In fp64 from the same numbers."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def grads(loss, *leaves):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], torch.tensor(0.7, dtype=loss.dtype))


@pytest.mark.parametrize("scale, cap", [(0.0625, None), (-3.0, None), (1.0, 5.0), (0.5, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_and_capped_logits(dtype, scale, cap):
    *leaves, labels = inputs(dtype)
    z = scale * (leaves[0].double() @ leaves[1].double().T + leaves[2].double())
    want = cross_entropy((z if cap is None else cap * torch.tanh(z / cap)).flatten(0, -2), labels.flatten())
    loss = chunked_loss(leaves[0], leaves[1], labels, leaves[2], scale=scale, cap=cap, tokens=7, vocabulary=13)
    assert abs(loss.item() - want.item()) <= 1e-5 * abs(want.item())
    for leaf, got, true in zip(leaves, grads(loss, *leaves), grads(want, *leaves), strict=True):
        bound = torch.finfo(dtype).eps * true.abs() + 1e-4 * true.abs().max()
        assert got.dtype == leaf.dtype and ((got - true).abs() <= bound).all()


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients(chunks, reduction, dtype):
    *leaves, labels = inputs(dtype)
    loss = chunked_loss(leaves[0], leaves[1], labels, leaves[2], reduction=reduction, tokens=chunks[0], vocabulary=chunks[1])
    want = plain(*leaves, labels, reduction)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    # Logits of magnitude 20 are off by 24 roundings of their terms, and so is their softmax, relatively: all below 1e-4.
    assert abs(loss.item() - want.item()) <= 1e-5 * abs(want.item())
    for leaf, got, true in zip(leaves, grads(loss, *leaves), grads(want, *leaves), strict=True):
        assert got.dtype == leaf.dtype
        bound = torch.finfo(dtype).eps * true.abs() + 1e-4 * true.abs().max()
        assert ((got - true).abs() <= bound).all()


def test_gradcheck():
    hidden, weight, bias, labels = inputs(torch.float64, shape=(5,))
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_loss(h, w, labels, b, tokens=2, vocabulary=17), (hidden, weight, bias), fast_mode=True
    )


def test_bf16_gradients_are_rounded_once():
    """Closer to the exact ones than through bf16 logits, whose rounding is 2^-9 of their magnitude."""
    hidden, weight, _, labels = inputs(torch.bfloat16, shape=(4, 64), bias=False)
    want = grads(plain(hidden, weight, None, labels), hidden, weight)
    ours = grads(chunked_loss(hidden, weight, labels, tokens=30, vocabulary=20), hidden, weight)
    usual = grads(cross_entropy((hidden @ weight.T).float().flatten(0, 1), labels.flatten()), hidden, weight)
    for got, other, true in zip(ours, usual, want):
        assert (got - true).abs().max() <= 2**-8 * true.abs().max()
        assert (got - true).double().norm() < 0.5 * (other - true).double().norm()


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size, times", [(1.0, 1), (1e-6, 64)])
def test_products_of_16_bit_operands(monkeypatch, dtype, size, times):
    """As on a GPU: only dz is rounded, to half a unit in the last place, and not below the range of fp16 for a small `size`."""
    module = importlib.import_module("lowrank_sys.nn.chunked_loss")
    monkeypatch.setattr(module, "_types", lambda hidden, weight: (torch.float32, hidden.dtype))
    monkeypatch.setattr(module, "_product", lambda a, b, wide: a.to(wide) @ b.to(wide))
    hidden, weight, _, labels = inputs(dtype, bias=False)
    # Large heads keep small gradients of the states in the range of fp16.
    hidden, weight = (x.detach().mul(by).requires_grad_() for x, by in ((hidden, 1 / times), (weight, times)))
    loss = size * chunked_loss(hidden, weight, labels, reduction="sum", tokens=7, vocabulary=13)
    want = size * plain(hidden, weight, None, labels, "sum")
    assert abs(loss.item() - want.item()) <= 1e-5 * abs(want.item())
    h, w, y = hidden.detach().flatten(0, 1).double(), weight.detach().double(), labels.flatten()
    dz = (h @ w.T).softmax(1)
    dz[torch.arange(len(y)), y.clamp(min=0)] -= 1
    dz = 0.7 * size * dz.abs() * (y != -100)[:, None]
    half = torch.finfo(dtype).eps / 2
    cases = list(zip(grads(loss, hidden, weight), grads(want, hidden, weight), ((dz @ w.abs()).view_as(hidden), dz.T @ h.abs())))
    for got, true, rounded in cases if times == 1 else cases[:1]:
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of a result
        assert ((got - true).abs() <= half * (true.abs() + rounded) + 1e-4 * true.abs().max() + least).all()


class Products(TorchDispatchMode):
    """The types of operands and results of every product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), keys=None):
        result = function(*arguments, **(keys or {}))
        if "mm" in str(function):
            self.seen.add((*(x.dtype for x in arguments if isinstance(x, torch.Tensor)), result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_on_a_gpu_16_bit_operands_stay(dtype):
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, D, device="cuda", dtype=dtype) for size in (30, V))
        labels = torch.empty(30, device="cuda", dtype=torch.int64)
        function = importlib.import_module("lowrank_sys.nn.chunked_loss")._CrossEntropy
        # The engine of autograd asks for a device, its functions do not.
        ctx = types.SimpleNamespace(needs_input_grad=(True, True, False))
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        with Products() as products:
            loss = function.forward(ctx, hidden, weight, None, labels, -100, 7, 13)
            got = function.backward(ctx, torch.ones_like(loss))[:2]
        assert loss.dtype == torch.float32 and [g.dtype for g in got] == [dtype, dtype]
        assert {kinds[-3:] for kinds in products.seen} == {(dtype, dtype, torch.float32)}


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_needed_gradients_are_made(frozen):
    hidden, weight, _, labels = inputs(bias=False)
    kept = {"hidden": weight, "weight": hidden}[frozen]
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    chunked_loss(hidden, weight, labels, tokens=7, vocabulary=13).backward()
    (want,) = torch.autograd.grad(plain(hidden, weight, None, labels), kept)
    torch.testing.assert_close(kept.grad, want, rtol=0, atol=1e-4 * want.abs().max().item())
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_labels_that_do_not_count():
    hidden, weight, _, labels = inputs(bias=False)
    other = torch.where(labels == -100, 3, labels)
    assert chunked_loss(hidden, weight, torch.where(labels == -100, V + 5, labels), ignore_index=V + 5) == chunked_loss(
        hidden, weight, labels
    )
    assert chunked_loss(hidden, weight, other) != chunked_loss(hidden, weight, labels)
    nothing = torch.full_like(labels, -100)
    assert chunked_loss(hidden, weight, nothing).isnan()  # as torch's
    total = chunked_loss(hidden, weight, nothing, reduction="sum")
    assert total == 0 and not any(g.any() for g in grads(total, hidden, weight))
    for wrong in (V, -1, 2**40):
        assert chunked_loss(hidden, weight, torch.where(labels == -100, wrong, labels), tokens=7, vocabulary=13).isnan()


def test_large_and_infinite_logits():
    hidden, weight, bias, labels = inputs()
    large = chunked_loss(hidden * 1e4, weight, labels, tokens=7, vocabulary=13)
    want = plain(hidden * 1e4, weight, None, labels)
    assert abs(large - want) <= 1e-5 * want
    bias = bias.detach().masked_fill(torch.arange(V) % 3 == 1, -torch.inf)  # entries that can never be drawn, a whole chunk
    bias[26:39] = -torch.inf
    labels = torch.where((labels % 3 == 1) | ((labels >= 26) & (labels < 39)), 0, labels)
    loss = chunked_loss(hidden, weight, labels, bias, tokens=7, vocabulary=13)
    assert torch.allclose(loss.double(), plain(hidden, weight, bias, labels), rtol=1e-5)
    for got, true in zip(grads(loss, hidden, weight), grads(plain(hidden, weight, bias, labels), hidden, weight)):
        torch.testing.assert_close(got, true, rtol=0, atol=1e-4 * true.abs().max().item())


def test_memory():
    """Beyond its inputs and gradients: a chunk of logits, a chunk of the head's weight and of its gradient, in fp32."""
    tokens, vocabulary, d, chunks = 512, 4096, 64, (128, 256)
    hidden = torch.randn(tokens, d, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, d, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with LiveStorages() as live:
        loss = chunked_loss(hidden, weight, labels, tokens=chunks[0], vocabulary=chunks[1])
        forward = live.peak
        loss.backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    per_chunk = 4 * (2 * chunks[0] * chunks[1] + 2 * chunks[1] * d + chunks[0] * d)  # logits and what is made of them
    per_token = 64 * tokens
    assert forward <= per_chunk + per_token
    assert live.peak <= gradients + 4 * hidden.numel() + per_chunk + per_token
    whole = 4 * tokens * vocabulary
    assert forward < whole / 8 and live.peak - gradients < whole / 8


def test_under_autocast_products_stay_fp32():
    hidden, weight, _, labels = inputs(bias=False)
    want = chunked_loss(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(hidden, weight, labels)
        got = grads(loss, hidden, weight)
    assert torch.equal(loss, want)
    for one, other in zip(got, grads(want, hidden, weight)):
        assert torch.equal(one, other)


def test_compiled_without_a_break():
    torch._dynamo.reset()
    hidden, weight, bias, labels = inputs()

    def function(hidden, weight, bias):
        return chunked_loss(hidden, weight, labels, bias, tokens=17, vocabulary=60)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss, want = compiled(hidden, weight, bias), function(hidden, weight, bias)
    torch.testing.assert_close(loss, want)
    for got, true in zip(grads(loss, hidden, weight, bias), grads(want, hidden, weight, bias)):
        torch.testing.assert_close(got, true)


def test_bad_input_is_named():
    hidden, weight, bias, labels = inputs()
    for keys, message in (
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be finite and not 0, got 0.0"),
        ({"scale": float("nan")}, "scale must be finite and not 0, got nan"),
        ({"cap": 0.0}, "cap must be above 0 and finite, or None, got 0.0"),
        ({"cap": float("inf")}, "cap must be above 0 and finite, or None, got inf"),
        ({"vocabulary": -3}, "vocabulary must be at least 1, got -3"),
        ({"hidden": hidden[..., :5]}, r"hidden must have shape .* and weight .*, got \(3, 11, 5\) and \(101, 24\)"),
        ({"labels": labels[:2]}, r"labels must be int64 of shape \(3, 11\), got torch.int64 \(2, 11\)"),
        ({"labels": labels.int()}, r"labels must be int64 of shape \(3, 11\), got torch.int32 \(3, 11\)"),
        ({"bias": bias[:5]}, r"bias must have shape \(101,\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            chunked_loss(**{"hidden": hidden, "weight": weight, "labels": labels, **keys})


# -- on a model


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    made = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=V, use_cache=False, **changes
    )
    return AutoModelForCausalLM.from_config(made, dtype=dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, torch.tensor(29)])
def test_the_loss_of_a_model_is_its_own(tied, items):
    model = llama(tie_word_embeddings=tied)
    ids = torch.randint(V, (2, 16))
    labels = ids.masked_fill(torch.arange(16) % 5 == 4, -100)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    theirs = model(input_ids=ids, labels=labels, attention_mask=mask, num_items_in_batch=items).loss
    ours = causal_lm_loss(model, ids, labels, attention_mask=mask, num_items_in_batch=items, tokens=9, vocabulary=20)
    assert abs(ours - theirs) <= 1e-6 * theirs
    params = list(model.parameters())
    for got, want in zip(torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
