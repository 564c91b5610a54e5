"""NF4 weights: what the ops promise beside the oracle, layers and models on them, and checkpoints."""

import copy
import io

import pytest
import torch
from families import config
from small_model import build
from test_planner import allocated, expected
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_sys import optim
from lowrank_sys._ops.nf4 import LEVELS
from lowrank_sys.nn import (
    QuantLinear,
    dequantize_model,
    is_quantized,
    quantize_model,
    quantized_from_config,
    quantized_from_pretrained,
    save_quantized,
)
from lowrank_sys.nn.quant_experts import QuantExperts

ops = torch.ops.lowrank
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_of(weight):
    packed, absmax = ops.quantize_nf4(weight)
    return ops.dequantize_nf4(packed, absmax, n=weight.shape[1])


# --- the ops


def test_every_value_goes_to_its_nearest_level():
    """By all distances in fp64; the widest gap of the levels bounds the error."""
    w = randn(20, 200)
    got, groups = values_of(w), nn.functional.pad(w, (0, 56)).reshape(20, 4, 64)
    units = w / groups.abs().amax(2).repeat_interleave(64, 1)[:, :200]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    nearest = (units.double()[..., None] - levels).abs().amin(2)
    error = ((got - w) / groups.abs().amax(2).repeat_interleave(64, 1)[:, :200]).abs().double()
    assert (error <= nearest + 1e-6).all() and error.max() <= (levels[1] - levels[0]) / 2


def test_values_are_a_fixed_point_and_rows_are_their_own():
    w = randn(5, 130)
    once, packed = values_of(w), ops.quantize_nf4(w)[0]
    assert torch.equal(values_of(once), once)
    assert torch.equal(packed, torch.cat([ops.quantize_nf4(row[None])[0] for row in w]))


@FLOATS
def test_the_linear_op_is_differentiable_in_x_and_bias(dtype):
    packed, absmax = ops.quantize_nf4(randn(12, 70))
    x, bias = randn(3, 70, seed=1).to(dtype).requires_grad_(), randn(12, seed=2).to(dtype).requires_grad_()
    ops.nf4_linear(x, packed, absmax, bias).float().square().sum().backward()
    y = ops.nf4_linear(x, packed, absmax, bias).detach()
    assert torch.equal(x.grad, ops.nf4_linear_backward(2 * y, packed, absmax, n=70))
    torch.testing.assert_close(bias.grad, (2 * y).float().sum(0).to(dtype))


@FLOATS
@pytest.mark.parametrize("t, m, n", [(1500, 1300, 1100), (64, 300, 201)])
def test_scratch(t, m, n, dtype):
    """To the byte."""
    w, x, dy, bias = randn(m, n).to(dtype), randn(t, n).to(dtype), randn(t, m).to(dtype), randn(m).to(dtype)
    packed, absmax = ops.quantize_nf4(w)
    for call, keys in (
        ((ops.nf4_linear.default, x, packed, absmax, bias), {}),
        ((ops.nf4_linear_backward.default, dy, packed, absmax), {"n": n}),
        ((ops.quantize_nf4.default, w), {}),
        ((ops.dequantize_nf4.default, packed, absmax), {"n": n}),
    ):
        assert allocated(*call, **keys) == expected(*call, **keys)


# --- a layer


@FLOATS
def test_a_layer_computes_with_its_values(dtype):
    linear = nn.Linear(71, 24).to(dtype)
    layer = QuantLinear.from_linear(linear, weights="nf4")
    assert layer.codes.shape == (24, 36) and layer.scale.shape == (24, 2) and layer.weight.shape == (24, 71)
    w = layer.dequantized(torch.float32)
    assert torch.equal(w, values_of(linear.weight.detach())) and torch.equal(layer.weight.detach().float(), w.to(dtype).float())
    x, dy = randn(5, 71).to(dtype).requires_grad_(), randn(5, 24, seed=1).to(dtype)
    layer(x).backward(dy)
    like = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(x).float(), x.float() @ w.T + linear.bias.float(), **like)
    torch.testing.assert_close(x.grad.float(), dy.float() @ w, **like)
    torch.testing.assert_close(layer.weight.grad.float(), dy.float().T @ x.detach().float(), **like)


def test_copies_pickles_and_state_dicts_are_exact():
    torch.manual_seed(0)
    layer = QuantLinear(33, 8, weights="nf4")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = QuantLinear(33, 8, weights="nf4")
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False), other):
        assert torch.equal(copied.codes, layer.codes) and torch.equal(copied.scale, layer.scale)
        assert copied.weight.shape == (8, 33) and copied.weight.codes is copied.codes
    assert layer.state_dict().keys() == {"codes", "scale", "bias"}
    dense = {"weight": randn(8, 33), "bias": layer.bias}
    other.load_state_dict(dense)
    assert torch.equal(other.dequantized(), values_of(dense["weight"]))
    with pytest.raises(RuntimeError, match="codes must be torch.uint8, got torch.int8"):
        other.load_state_dict(QuantLinear(33, 8).state_dict())


def test_names_that_are_none_are_refused():
    for make in (lambda: QuantLinear(8, 8, weights="nf3"), lambda: quantize_model(build(), weights="nf3")):
        with pytest.raises(ValueError, match="weights must be one of int8, nf4, got 'nf3'"):
            make()


# --- a model


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=71, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes))


IDS = torch.arange(12)[None]


def test_a_model_is_quantized_in_place_and_given_back():
    model = llama()
    wanted = {name: m.weight.detach().clone() for name, m in model.named_modules() if type(m) is nn.Linear}
    quantize_model(model, weights="nf4")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers and all(is_quantized(m.weight) and m.coding.name == "nf4" for m in layers.values())
    assert all(torch.equal(m.dequantized(), values_of(wanted[name])) for name, m in layers.items())
    assert model.config.quantization_config == {"quant_method": "lowrank_nf4", "group_size": 64}
    before = model(IDS).logits
    torch.testing.assert_close(dequantize_model(model)(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("group_size", [None, 32])
def test_a_checkpoint_is_read_back_exactly(tmp_path, group_size):
    """Drawn, saved with a manifest, read; and an ordinary checkpoint, quantized as it is read."""
    source = llama()
    model = quantized_from_config(source.config, seed=3, weights="nf4", group_size=group_size)
    save_quantized(model, tmp_path / "own")
    again = quantized_from_pretrained(tmp_path / "own")
    own, read = model.state_dict(), again.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
    assert again.config.quantization_config["group_size"] == (group_size or 64)
    source.save_pretrained(tmp_path / "plain")
    read = quantized_from_pretrained(tmp_path / "plain", weights="nf4", group_size=group_size)
    wanted = quantize_model(source, weights="nf4", group_size=group_size).state_dict()
    assert all(torch.equal(wanted[key], value) for key, value in read.state_dict().items())


def test_experts_are_kept_so_and_trained(tmp_path):
    """Each with a part of its own, in the checkpoint too."""
    torch.manual_seed(0)
    model = quantize_model(AutoModelForCausalLM.from_config(config("mixtral"), dtype=torch.float32), weights="nf4")
    experts = [
        layer for m in model.modules() if isinstance(m, QuantExperts) for layer in m.modules() if isinstance(layer, QuantLinear)
    ]
    assert len(experts) == 16 and all(layer.coding.name == "nf4" for layer in experts)
    optimizer, losses = optim.LoQT(optim.param_groups(model, rank=4, update_proj_gap=2), lr=2e-2), []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and sum(layer.part is not None for layer in experts) > 8
    save_quantized(model, tmp_path)
    own, read = model.state_dict(), quantized_from_pretrained(tmp_path).state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)


def test_only_loqt_trains_them():
    groups = optim.param_groups(quantize_model(build(), weights="nf4"), rank=4)
    with pytest.raises(ValueError, match="must be float or INT8, or trained by LoQT, got NF4"):
        optim.GaLoreAdamW(groups)
