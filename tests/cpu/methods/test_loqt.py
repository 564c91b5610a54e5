"""LoQT on quantized weights: each step against a transcription in fp64, resume, merges, low-rank gradients, bytes, checkpoints."""

import copy

import pytest
import torch
from methods.inputs import ADAM, COMMON, gradients, matrix_of
from methods.transcriptions.loqt import int8, loqt, nf4
from torch import nn

from lowrank_sys.nn import QuantLinear, project_model, quantize_model, quantized_from_pretrained, save_quantized
from lowrank_sys.optim import CapturedStep, LoQT, param_groups
from lowrank_sys.optim.merging import nearest

QUANTIZERS = {"nf4": nf4, "int8": int8}
WEIGHTS = pytest.mark.parametrize("weights", QUANTIZERS)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
R, STEPS = 3, 17  # refreshes at 0, 4, 9 and 14


def layer_of(shape, weights):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = matrix_of(shape)
    return QuantLinear.from_linear(linear, weights=weights)


def lone(layer, left=True, **keys):
    sides = {"proj_type": "left" if left else "right"}
    return LoQT([{"params": [layer.weight], "rank": R, "subspace": "svd", "update_proj_gap": 4, **sides, **keys}], **COMMON)


def feed(layer, optimizer, grads):
    for g in grads:
        layer.weight.grad = g
        optimizer.step()


# --- the steps


@pytest.mark.parametrize("compensation", [5, 1, 0])
@pytest.mark.parametrize("shape", [(8, 140), (140, 9), (24, 24)], ids=str)
@SIDES
@WEIGHTS
def test_every_step_is_the_paper_s(weights, left, shape, compensation):
    layer, series = layer_of(shape, weights), list(gradients(shape, STEPS))
    optimizer = lone(layer, left, compensation=compensation, gap_growth=1.3)
    h = {**ADAM, "rank": R, "gap": 4, "growth": 1.3, "scale": 0.25, "compensation": compensation}
    expected = loqt(matrix_of(shape).double(), [g.double() for g in series], left, quantize=QUANTIZERS[weights], **h)
    for t, (g, want) in enumerate(zip(series, expected)):
        layer.weight.grad = g
        optimizer.step()
        got = layer.dequantized(torch.float32).double()
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5, msg=lambda m: f"step {t}: {m}")
    assert int(optimizer.state[layer.weight]["merges"]) == 4


@WEIGHTS
def test_codes_stay_within_a_gap_and_values_move(weights):
    layer, series = layer_of((24, 40), weights), list(gradients((24, 40), 6))
    optimizer = lone(layer, lr=0.5)  # in steps far below a level codes would stay after a merge too
    codes, values, moved = layer.codes.clone(), layer.dequantized(), []
    for g in series:
        feed(layer, optimizer, [g])
        moved.append((not torch.equal(layer.codes, codes), not torch.equal(layer.dequantized(), values)))
        codes, values = layer.codes.clone(), layer.dequantized()
    assert [code for code, _ in moved] == [False, False, False, False, True, False] and all(value for _, value in moved)


def test_compensation_brings_the_pair_nearer_to_the_weight():
    """In every alternation or not at all; more than a basis of rank 8 takes off one error."""
    w, basis = matrix_of((64, 256)), torch.linalg.qr(matrix_of((64, 8), 1)).Q
    layer = layer_of((64, 256), "nf4")

    def error(iterations):
        codes, scale, x = nearest(w, layer.coding, 64, basis, True, torch.zeros(8, 256), iterations)
        return float((layer.coding.decode(codes, scale, 256, 64, torch.float32) + basis @ x - w).norm())

    errors = [error(i) for i in (0, 1, 2, 5)]
    assert errors[1] < 0.97 * errors[0] and errors == sorted(errors, reverse=True)


def test_a_basis_of_less_than_full_rank_is_no_harm():
    basis = torch.zeros(16, 3)
    basis[:, 0] = 0.25
    layer = layer_of((16, 64), "nf4")
    codes, scale, x = nearest(matrix_of((16, 64)), layer.coding, 64, basis, True, torch.zeros(3, 64), 5)
    assert x.isfinite().all() and scale.isfinite().all()


# --- a state


@WEIGHTS
@pytest.mark.parametrize("stop", [3, 4, 5, 11])
def test_resume_to_the_bit(weights, stop):
    """In a gap, before and after a merge; into a layer that has no part yet."""
    series = list(gradients((24, 40), STEPS))
    layer = layer_of((24, 40), weights)
    optimizer = lone(layer)
    feed(layer, optimizer, series[:stop])
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    feed(layer, optimizer, series[stop:])
    other = layer_of((24, 40), weights)
    again = lone(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    feed(other, again, series[stop:])
    own, read = layer.state_dict(), other.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)


def test_bytes_beside_those_of_the_state():
    """Of 24 x 40 in NF4: codes, an absmax a row, the factor in fp32, and the basis in INT4 twice, in the state and in the layer."""
    layer = layer_of((24, 40), "nf4")
    optimizer = lone(layer)
    feed(layer, optimizer, list(gradients((24, 40), 2)))
    held = {name: buffer.nbytes for name, buffer in layer.named_buffers()}
    basis = {"basis": R * 12, "basis_scale": 4 * R, "basis_offset": 4 * R}
    assert held == {"codes": 24 * 20, "scale": 4 * 24, "factor_of_left": 4 * R * 40, **basis}
    weights = optimizer.memory()["weights"]
    assert weights - layer.weight.untyped_storage().nbytes() == sum(held.values()) - held["scale"]


@pytest.mark.parametrize("change, wanted", [
    (lambda s: s | {"factor_of_left": s["factor_of_left"][:, 1:]}, r"factor_of_left must be torch.float32 of shape \(3, 40\), got"),
    (lambda s: s | {"factor_of_left": s["factor_of_left"].half()}, "got torch.float16 of"),
    (lambda s: s | {"factor_of_right": torch.zeros(24, R)}, "must be one of factor_of_left, factor_of_right with a basis, got"),
    (lambda s: {key: s[key] for key in s if key != "basis_offset"}, "with a basis, got factor_of_left, basis, basis_scale"),
    (lambda s: s | {"basis": s["basis"][:, 1:]}, "basis"),
    (lambda s: s | {"basis_scale": s["basis_scale"].half()}, "basis_scale"),
], ids=["shape", "dtype", "two sides", "no offsets", "basis", "scales"])  # fmt: skip
def test_what_is_no_part_is_not_loaded(change, wanted):
    layer = layer_of((24, 40), "nf4")
    feed(layer, lone(layer), list(gradients((24, 40), 2)))
    state = dict(layer.state_dict())
    other = layer_of((24, 40), "nf4")
    with pytest.raises(RuntimeError, match=f"weight: .*{wanted}"):
        other.load_state_dict(change(state))
    assert other.part is None


# --- a model


def llama(projected=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = quantize_model(LlamaForCausalLM(LlamaConfig(**sizes)), weights="nf4")
    if projected:
        project_model(model, 4, projected)
    keys = {"refresh": "next"} if projected else {"proj_type": "right"}
    groups = param_groups(model, rank=4, update_proj_gap=3, **keys)
    return model, LoQT(groups, lr=1e-2, per_layer="accumulate" if projected else None)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        ids = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(step % 2))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_projected_layers_no_gradient_is_of_a_weight_s_size(side):
    """And the losses fall as they do without, over merges."""
    model, optimizer = llama(side)
    seen = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.weight.requires_grad]
    losses = train(model, optimizer, range(16))
    assert seen and all(m.weight.grad is None and m.part is not None for m in seen)
    assert losses[-1] < 0.8 * losses[0]


def test_a_checkpoint_has_the_part(tmp_path):
    model, optimizer = llama()
    train(model, optimizer, range(5))
    save_quantized(model, tmp_path)
    read = quantized_from_pretrained(tmp_path)
    own, again = model.state_dict(), read.state_dict()
    assert any("factor_of_right" in key for key in own)
    assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own)
    ids = torch.arange(12)[None]
    assert torch.equal(read(ids).logits, model.eval()(ids).logits)


@SIDES
def test_a_layer_with_a_part_compiles_without_a_break(left):
    layer = layer_of((24, 40), "nf4")
    feed(layer, lone(layer, left, lr=0.1), list(gradients((24, 40), 3)))
    torch._dynamo.reset()
    found = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        x = matrix_of((5, 40)).requires_grad_()
        layer.weight.grad = None
        y = function(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, layer.weight.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_captured_step_refuses_merges():
    with pytest.raises(ValueError, match="must make no basis on the host's word to be captured, got LoQT"):
        CapturedStep(lone(layer_of((8, 12), "nf4")))
