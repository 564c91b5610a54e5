"""Rules for pairs of factors on models of peft: pairs found by its names, ranks and first bases, training."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lowrank_sys.lora import adjust_gradients, full_gradients, gora_, gora_ranks, lora_one_, pairs, refactorize
from lowrank_sys.nn import quantize_model

peft = pytest.importorskip("peft", reason="peft is not installed")

IDS = torch.arange(64).reshape(2, 32) % 50
BATCHES = [IDS, (IDS * 3 + 1) % 50]
LAYERS = ["q_proj", "v_proj", "down_proj"]


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, use_cache=False), dtype=dtype)


def adapted(model=None, **options):
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **options}
    return peft.get_peft_model(model or llama(), peft.LoraConfig(**options))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def true_gradients(model, names):
    """Of autograd, on the weights of a plain model."""
    (sum(loss_of(model, ids) for ids in BATCHES) / len(BATCHES)).backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


def test_pairs_have_the_names_of_the_base_model():
    model = adapted(rank_pattern={"down_proj": 2}, use_rslora=True)
    base = dict(llama().named_modules())
    found = pairs(model)
    assert len(found) == 6
    for pair in found:
        r = 2 if pair.name.endswith("down_proj") else 4
        m, n = base[pair.name].weight.shape
        assert pair.A.shape == (r, n) and pair.B.shape == (m, r)
        assert pair.scale == pytest.approx(8 / math.sqrt(r))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["k_proj"]))
    assert len(pairs(model)) == 8 and len(pairs(model, "other")) == 2 and len(pairs(model, "default")) == 6
    with pytest.raises(ValueError, match="model has no pair of factors of adapter 'none'"):
        pairs(model, "none")


def test_other_adapters_are_refused():
    with pytest.raises(ValueError, match=r"q_proj must be of weight W \+ scale B A, got \w*Dora\w* in adapter 'default'"):
        pairs(adapted(use_dora=True))
    with pytest.raises(ValueError, match="model has no pair of factors, got LlamaForCausalLM"):
        pairs(llama())


def test_full_gradients_are_those_of_autograd_and_touch_nothing():
    plain = llama()
    want = true_gradients(llama(), [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")])
    for model, options in ((plain, {"target_modules": ["q_proj", "down_proj"]}), (adapted(llama()), {})):
        state = [p.requires_grad for p in model.parameters()]
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        got = full_gradients(model, BATCHES, loss_of, **options)
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
        assert [p.requires_grad for p in model.parameters()] == state
        assert all(p.grad is None for p in model.parameters())
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    with pytest.raises(ValueError, match="batches must reach a linear layer, got 0 of them"):
        full_gradients(plain, [], loss_of)


def test_a_quantised_base_has_full_gradients_too():
    model = quantize_model(llama())
    dense = {name: module.dequantized() for name, module in model.named_modules() if hasattr(module, "dequantized")}
    plain = llama()
    for name, weight in dense.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    want = true_gradients(plain, dense)
    got = full_gradients(model, BATCHES, loss_of, device="cpu")
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_gpt2s_transposed_weights():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 64}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    base = AutoModelForCausalLM.from_config(GPT2Config(**sizes, **dropout, use_cache=False))
    gradients = full_gradients(base, BATCHES, loss_of, target_modules=["c_attn"])
    (name,) = gradients
    assert gradients[name].shape == (96, 32)
    ranks = gora_ranks(base, gradients, 4)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, rank_pattern=ranks, target_modules=["c_attn"], fan_in_fan_out=True))
    before = loss_of(model, IDS).item()
    gora_(model, gradients, step=0.1)
    assert loss_of(model, IDS).item() < before


@pytest.mark.parametrize("start", [lora_one_, gora_])
def test_a_first_basis_is_a_step_down(start):
    model = adapted(use_rslora=True)
    mean = sum(loss_of(model, ids).item() for ids in BATCHES) / 2
    start(model, full_gradients(model, BATCHES, loss_of))
    assert sum(loss_of(model, ids).item() for ids in BATCHES) / 2 < mean


def test_goras_ranks_are_a_rank_pattern():
    base = llama()
    gradients = full_gradients(base, BATCHES, loss_of, target_modules=LAYERS)
    ranks = gora_ranks(base, gradients, 4)
    model = adapted(base, rank_pattern=ranks, use_rslora=True)
    assert {pair.name: pair.A.shape[0] for pair in pairs(model)} == ranks
    assert len(set(ranks.values())) > 1 and all(2 <= r <= 16 for r in ranks.values())
    gora_(model, gradients)
    assert all(pair.B.any() for pair in pairs(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["lora-pro", "riemannian"])
def test_training(rule, dtype):
    model = adapted(llama(dtype))
    nn.init.normal_(model.get_input_embeddings().weight)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    adjust_gradients(optimizer, model, rule)
    losses = []
    for step in range(30):
        loss = loss_of(model, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 15:
            before = [(pair.B.float() @ pair.A.float()).detach() for pair in pairs(model)]
            assert refactorize(model, optimizer) == 6
            for pair, w in zip(pairs(model), before):
                assert (pair.B.float() @ pair.A.float() - w).norm() <= 8 * torch.finfo(pair.A.dtype).eps * w.norm()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_pair_with_a_frozen_factor_keeps_its_gradient(frozen):
    model = adapted()
    for name, p in model.named_parameters():
        if frozen in name:
            p.requires_grad_(False)
        elif "lora_B" in name:
            nn.init.normal_(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adjust_gradients(optimizer, model)
    loss_of(model, IDS).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert before and all(torch.equal(g, p.grad) for g, p in zip(before, (p for p in model.parameters() if p.grad is not None)))
