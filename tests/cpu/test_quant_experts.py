"""Experts in INT8: their values, gradients, files and training are those of the matrices that they are."""

import copy
import io
import json
import warnings

import pytest
import torch
from families import config
from lanes import usual
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_sys.nn import dequantize_model, project_model, quantize_model, quantized_from_config, quantized_from_pretrained
from lowrank_sys.nn.pretrained import save_quantized
from lowrank_sys.nn.quant_experts import LAYERS, QuantExperts
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.optim import param_groups
from lowrank_sys.optim.preset import METHODS

KINDS = usual(["mixtral", "gpt_oss"], "qwen3_moe", "deepseek_v3", "granitemoe", "olmoe")
EACH = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(0))


def moe(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)


def owners(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def assert_same(a, b):
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@EACH
def test_values_and_gradients_are_those_of_the_stack(kind):
    model = moe(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none stays float
        quantize_model(model)
    assert owners(model)
    stacks = dequantize_model(copy.deepcopy(model))
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, stacks)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for path, module in owners(model).items():
        theirs = stacks.get_submodule(path)
        assert type(theirs) is module.base
        for name, layers in module.quant_experts.items():
            grads = getattr(theirs, name).grad
            grads = grads.transpose(1, 2) if module.is_transposed else grads
            for layer, grad in zip(layers, grads, strict=True):
                own = torch.zeros_like(grad) if layer.weight.grad is None else layer.weight.grad
                torch.testing.assert_close(own, grad, rtol=0, atol=2e-5 * grads.abs().max().item())


@EACH
def test_a_checkpoint_of_single_experts_is_read_as_one_of_stacks(tmp_path, kind):
    plain = moe(kind)
    plain.save_pretrained(tmp_path / "float")
    model = quantized_from_pretrained(tmp_path / "float")
    assert_same(model, quantize_model(plain))
    save_quantized(model, tmp_path / "int8")
    assert_same(quantized_from_pretrained(tmp_path / "int8"), model)
    dequantize_model(model).save_pretrained(tmp_path / "merged")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)


def test_a_float_state_is_quantized_as_it_is_loaded():
    model, other = quantize_model(moe("gpt_oss")), quantize_model(moe("gpt_oss", seed=1))
    other.load_state_dict(moe("gpt_oss").state_dict())
    assert_same(other, model)
    for one in (copy.deepcopy(model), _pickled(model)):
        assert_same(one, model)
        assert torch.equal(one(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert {layer.weight.dtype for m in owners(model.to(torch.bfloat16)).values() for layer in m.quant_experts["down_proj"]} == {
        torch.bfloat16
    }


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_drawn_from_a_configuration():
    model = quantized_from_config(config("mixtral"), seed=0)
    matrices = [layer.dequantized() for module in owners(model).values() for layer in module.quant_experts["gate_up_proj"]]
    assert len(matrices) == 8 and all(0.01 < matrix.std() < 0.04 for matrix in matrices)
    assert not any(p.dim() == 3 for p in model.parameters())


def test_some_are_chosen():
    with pytest.warns(UserWarning, match="4 parameters of several matrices each stay in torch.float32, 70% of all weights"):
        assert not owners(quantize_model(moe("mixtral"), target_modules=["q_proj"]))
    model = quantize_model(moe("mixtral"), target_modules=["experts"])
    assert owners(model) and type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with pytest.raises(ValueError, match="no linear layer to quantize has 'exparts'"):
        quantize_model(moe("mixtral"), target_modules=["exparts"])
    with pytest.raises(ValueError, match="no linear layer to quantize has 'down_proj'"):  # half of a module's stacks is none
        quantize_model(moe("mixtral"), target_modules=["q_proj", "down_proj"])


LOW_RANK = [name for name, method in METHODS.items() if method.rank is not None]


@pytest.mark.parametrize("name", usual(["q-galore"], *(name for name in LOW_RANK if name != "q-galore")))
def test_every_method_trains_them(name):
    method = METHODS[name]
    model = quantize_model(moe("mixtral"))
    groups = param_groups(model, rank=min(4, method.rank), **method.keys)
    inside = [n for n, _ in groups[1]["params"] if LAYERS in n]
    assert len(inside) == 16
    optimizer = method.optimizer(groups, lr=method.lr, **method.options)
    experts = [layer for n, layer in model.named_modules() if LAYERS in n and isinstance(layer, QuantLinear)]
    before, losses = [layer.dequantized() for layer in experts], []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] != losses[-1] < 7
    assert any(not torch.equal(values, layer.dequantized()) for values, layer in zip(before, experts))


def test_projected_experts_train_as_others():
    model = project_model(quantize_model(moe("mixtral")), 4)
    optimizer = METHODS["galore"].optimizer(param_groups(model, rank=4), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if LAYERS in n and "low_rank" not in n)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_stack_of_another_number_is_refused(tmp_path):
    moe("gpt_oss").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_local_experts": 3}))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.\w+: \w+ must be 3 matrices, got \(4, "):
        quantized_from_pretrained(tmp_path)
