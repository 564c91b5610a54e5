"""Models with INT8 weights: quantized in place, drawn, read from checkpoints and written to them, in how much memory."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_sys.memory import rehearsal
from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.nn import (
    QuantLinear,
    causal_lm_loss,
    dequantize_model,
    is_quantized,
    quantize_model,
    quantized_from_config,
    quantized_from_pretrained,
    save_quantized,
)
from lowrank_sys.optim import param_groups
from lowrank_sys.train import models

IDS = torch.arange(40).reshape(2, 20)
GROUP = 32
WIDEST = 64 * 176  # elements of the largest matrix of a layer


def config(**changes):
    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 96,
            "use_cache": False,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def llama(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(**changes), dtype=dtype)


def quantized_names(model):
    return [name for name, param in model.named_parameters() if is_quantized(param)]


def assert_same(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert list(state) == list(others)
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def bytes_of(model):
    return sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_are_those_that_train_in_a_subspace(tied):
    model = llama(tie_word_embeddings=tied)
    before = param_groups(model, rank=4)
    names = [name for name, _ in before[1]["params"]]
    order = [name for name, _ in model.named_parameters()]
    assert quantize_model(model, group_size=GROUP) is model
    assert quantized_names(model) == names and len(names) == 21
    assert [name for name, _ in model.named_parameters()] == order
    after = param_groups(model, rank=4)
    for old, new in zip(before, after):
        assert [name for name, _ in old["params"]] == [name for name, _ in new["params"]]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_logits_and_gradients_are_those_of_the_dequantized_model():
    model = quantize_model(llama(), group_size=GROUP)
    plain = dequantize_model(copy.deepcopy(model))
    assert quantized_names(plain) == [] and any(is_quantized(p) for p in model.parameters())
    found = []
    for each in (model, plain):
        loss = each(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {name: p.grad for name, p in each.named_parameters()})
    for name, want in found[1].items():
        # fp32 sums of some hundred terms in another order, a dozen layers deep
        torch.testing.assert_close(found[0][name], want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(use_reentrant):
    model = quantize_model(llama(), group_size=GROUP).train()
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_codes_are_the_nearest_and_the_rest_is_untouched():
    model = llama(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
    quantize_model(model, group_size=GROUP)
    layer = model.model.layers[1].mlp.down_proj
    codes, scale = torch.ops.lowrank.quantize_int8(before["model.layers.1.mlp.down_proj.weight"], group_size=GROUP)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale)
    assert model.model.embed_tokens.weight is embedding and model.model.norm.weight is norm
    assert type(model.lm_head) is nn.Linear and torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_target_modules_frozen_weights_and_biases():
    model = llama(attention_bias=True)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    bias = model.model.layers[0].self_attn.q_proj.bias
    quantize_model(model.eval(), target_modules=["q_proj", "layers.2.mlp"], group_size=GROUP)
    names = quantized_names(model)
    assert len(names) == 6 and all("q_proj" in name or "layers.2.mlp" in name for name in names)
    layer = model.model.layers[0].self_attn.q_proj
    assert not layer.weight.requires_grad and layer.bias is bias and not layer.training
    assert model.model.layers[1].self_attn.q_proj.weight.requires_grad
    dequantize_model(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear and not layer.weight.requires_grad and layer.bias is bias and not layer.training


def test_what_is_shared_or_special_stays():
    class Special(nn.Linear):
        pass

    shared, one, two = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "one": one, "two": two, "special": Special(8, 8)})
    model["head"] = nn.Linear(8, 8)
    quantize_model(model)
    assert isinstance(model["a"], QuantLinear) and model["a"] is model["b"]
    assert type(model["one"]) is type(model["two"]) is type(model["head"]) is nn.Linear and type(model["special"]) is Special
    dequantize_model(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"]


def test_bad_input_is_named():
    for model in (nn.Sequential(nn.LayerNorm(8)), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match=f"model has no linear layer to quantize, got {type(model).__name__}"):
            quantize_model(model)
        with pytest.raises(ValueError, match=f"model has no quantized weights, got {type(model).__name__}"):
            dequantize_model(model)
    model = llama()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="target_modules: no linear layer to quantize has 'qproj' in its name"):
        quantize_model(model, target_modules=["mlp", "qproj"])
    with pytest.raises(ValueError, match="target_modules must be a list of substrings of module names, got 'q_proj'"):
        quantize_model(model, target_modules="q_proj")
    with pytest.raises(ValueError, match="target_modules must be a list of substrings of module names, got 'q_proj'"):
        param_groups(model, rank=4, target_modules="q_proj")
    for make in (lambda: quantize_model(model, group_size=100), lambda: quantized_from_config(config(), group_size=100)):
        with pytest.raises(ValueError, match="group_size must be a power of two from 32 to 1024, got 100"):
            make()
    assert_same(model, before)  # nothing was replaced
    model.model.layers[1].mlp.up_proj.double()
    with pytest.raises(ValueError, match="up_proj.weight must be float32, bfloat16 or float16, got torch.float64"):
        quantize_model(model)
    assert not quantized_names(model)


def test_quantizing_in_place_holds_one_layer_more():
    model = llama()
    with LiveStorages() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.track(tensor)
        del tensor
        before, largest = live.bytes, WIDEST + 4 * 64 * 6  # codes and scales of down_proj
        quantize_model(model, group_size=GROUP)
        assert live.bytes == bytes_of(model) < 0.5 * before
        assert live.peak <= before + largest + 64
        small = live.bytes
        live.peak = 0
        dequantize_model(model)
        assert live.peak <= live.bytes + largest + 64 and live.bytes >= before > small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drawing_holds_one_layer_more(dtype):
    with LiveStorages() as live:
        model = quantized_from_config(config(), dtype, seed=1, group_size=GROUP)
        assert live.bytes == bytes_of(model)
        assert live.peak <= live.bytes + dtype.itemsize * WIDEST


def test_drawn_weights_are_the_models_own_initialisation():
    drawn = quantized_from_config(config(attention_bias=True), torch.bfloat16, seed=7, group_size=GROUP)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(attention_bias=True), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(7)
    model.initialize_weights()
    assert_same(drawn, quantize_model(model, group_size=GROUP))
    for (name, buffer), (_, other) in zip(drawn.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert drawn.training and torch.equal(drawn(IDS).logits, model.train()(IDS).logits)
    weight = drawn.model.layers[0].mlp.gate_proj.dequantized(torch.float32)
    assert abs(weight.std() / drawn.config.initializer_range - 1) < 0.05  # of 11264 draws: 7 standard errors


def test_seeds():
    state = torch.get_rng_state()
    one, same, other = (quantized_from_config(config(), seed=seed, group_size=GROUP) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(one, same)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    torch.manual_seed(1)
    built = models.build(config(), dtype=torch.float32, device=torch.device("cpu"), weights="int8")
    assert torch.equal(built.lm_head.weight, one.lm_head.weight) and not torch.equal(torch.get_rng_state(), state)
    assert len(quantized_names(built)) == 21


def test_tied_weights_are_drawn_once():
    model = quantized_from_config(config(tie_word_embeddings=True), seed=1, group_size=GROUP)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
    assert model(IDS).logits.isfinite().all()


def test_fake_models_take_what_real_ones_do():
    found = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), None):
        with LiveStorages() as live:
            if mode is None:
                model = models.build(config(), dtype=torch.bfloat16, device=torch.device("cpu"), weights="int8")
            else:
                with mode:
                    model = models.build(config(), dtype=torch.bfloat16, device=torch.device("cpu"), weights="int8")
        assert len(quantized_names(model)) == 21
        found.append((live.peak, live.bytes))
    assert found[0] == found[1]


def test_a_rehearsed_step_takes_what_the_real_one_does():
    def step():
        model = models.build(config(), dtype=torch.bfloat16, device=torch.device("cpu"), weights="int8")
        for param in model.parameters():  # as per_layer does
            param.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)) or setattr(p, "grad", None))
        ids = torch.zeros(4, 33, dtype=torch.int64)
        causal_lm_loss(model, ids, ids, tokens=32, vocabulary=50).backward()
        return model

    found = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), contextlib.nullcontext()):
        seen = []
        with LiveStorages() as live, mode, rehearsal._as_if_real():
            model = step()
        assert seen.count((176, 64)) == 6 and len(seen) == len(list(model.parameters()))
        found.append((live.peak, live.bytes))
        del model
    assert found[0] == found[1]


# -- on the disk


@pytest.mark.parametrize("shards", ["10GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_reading_a_float_checkpoint(tmp_path, shards, tied):
    plain = llama(tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "60KB")
    with LiveStorages() as live:
        model = quantized_from_pretrained(tmp_path, group_size=GROUP)
        assert live.bytes == bytes_of(model)
        assert live.peak <= live.bytes + 4 * WIDEST + 64
    assert_same(model, quantize_model(plain.eval(), group_size=GROUP))
    assert not model.training and torch.equal(model(IDS).logits, plain(IDS).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_weights_are_quantized_as_they_are_stored(tmp_path):
    plain = llama()
    plain.save_pretrained(tmp_path)
    model = quantized_from_pretrained(tmp_path, torch.bfloat16, target_modules=["mlp"], group_size=GROUP)
    layer, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj.weight"
    codes, scale = torch.ops.lowrank.quantize_int8(plain.state_dict()[name], group_size=GROUP)
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scale, scale) and layer.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16 and len(quantized_names(model)) == 9
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_what_was_read_does_not_depend_on_the_file(tmp_path):
    llama().save_pretrained(tmp_path)
    model = quantized_from_pretrained(tmp_path, group_size=GROUP)
    before = copy.deepcopy(model)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:  # in place: a mapped page would change
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 4))
    assert_same(model, before)


@pytest.mark.parametrize("shards", ["10GB", "30KB"])
@pytest.mark.parametrize(
    "save",
    [save_quantized, lambda model, folder, **keys: model.save_pretrained(folder, **keys)],
    ids=["save_quantized", "save_pretrained"],
)
def test_int8_checkpoints_are_exact(tmp_path, save, shards):
    model = quantized_from_config(
        config(attention_bias=True), torch.bfloat16, seed=3, group_size=64, target_modules=["mlp", "q_proj"]
    )
    model.generation_config.max_length = 77
    save(model, tmp_path, max_shard_size=shards)
    with LiveStorages() as live:
        read = quantized_from_pretrained(tmp_path)
        largest = 2 * 64 * 96  # the embedding, as it is read and as it stays
        assert live.peak <= live.bytes + largest + 64
    assert_same(read, model)
    assert quantized_names(read) == quantized_names(model) and read.dtype == torch.bfloat16
    assert read.model.layers[0].mlp.up_proj.group_size == 64 and read.generation_config.max_length == 77
    assert torch.equal(read(IDS).logits, model.eval()(IDS).logits)
    save(read, tmp_path / "again", max_shard_size=shards)
    assert_same(quantized_from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dequantized_model_is_an_ordinary_checkpoint(tmp_path, dtype):
    model = quantized_from_config(config(), dtype, seed=3, group_size=GROUP).eval()
    values = model.model.layers[0].mlp.up_proj.dequantized()
    dequantize_model(model).save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == dtype and torch.equal(plain.model.layers[0].mlp.up_proj.weight, values)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert_same(plain, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_quantized(quantized_from_config(config(), seed=3, group_size=GROUP), folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("position", [3, 100, -1, "middle"])
def test_a_flipped_byte_is_found(folder, position):
    path = sorted(folder.glob("*.safetensors"))[1]
    flip(path, path.stat().st_size // 2 if position == "middle" else position)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(its SHA-256 differs\)"):
        quantized_from_pretrained(folder)


def test_other_damage_is_found(folder, tmp_path):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    size, whole = first.stat().st_size, first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{first.name} has {size - 1} bytes instead of {size}"):
        quantized_from_pretrained(folder)
    (folder / "manifest.json").unlink()  # without checksums, the format's own checks
    for kept in (size - 1, 100, 7, 0):
        first.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"{first.name} is damaged"):
            quantized_from_pretrained(folder)
    first.write_bytes(whole)
    quantized_from_pretrained(folder)
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks {second.name}, which model.safetensors.index.json names"):
        quantized_from_pretrained(folder)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="model.safetensors.index.json is damaged"):
            quantized_from_pretrained(folder)


def test_a_damaged_manifest_is_found(folder):
    flip(folder / "manifest.json", 40)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        quantized_from_pretrained(folder)


def test_what_does_not_fit_is_named(folder, tmp_path):
    def expect(message, state=None, **entries):
        settings = {**json.loads((folder / "config.json").read_text()), **entries}
        made = tmp_path / "made"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        (made / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        if state is not None:
            save_file(state, made / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            quantized_from_pretrained(made)

    from safetensors.torch import save_file

    state = quantized_from_pretrained(folder).state_dict()
    codes, norm = "model.layers.1.mlp.up_proj.codes", "model.norm.weight"

    def without(name):
        return {key: value for key, value in state.items() if key != name}

    expect("has no model.safetensors and no model.safetensors.index.json")
    expect(f"lacks 1 tensors of the model, the first {norm}", without(norm))
    scale = codes.replace("codes", "scale")
    expect(f"lacks 1 tensors of the model, the first {scale}", without(scale))
    expect("the model has no model.other.weight, which the checkpoint has", {**state, "model.other.weight": torch.ones(2)})
    expect(r"model.norm.weight must have shape \(64,\), got \(63,\)", {**state, norm: torch.ones(63)})
    expect(rf"{codes} must have shape \(176, 64\), got \(64, 176\)", {**state, codes: state[codes].T.contiguous()})
    expect(f"{codes} must be torch.int8, got torch.float32", {**state, codes: state[codes].float()})
    expect("config.json has no quantization_config for quantized weights such as", state, quantization_config=None)
    expect(
        "weights must be float, or INT8 or NF4 of lowrank_sys, got quantization_config",
        state,
        quantization_config={"quant_method": "gptq", "bits": 4},
    )
    expect(
        "group_size must be a power of two from 32 to 1024, got None", state, quantization_config={"quant_method": "lowrank_int8"}
    )
    expect(
        r"model.layers.0.mlp.down_proj.scale must have shape \(64, 3\), got \(64, 6\)",
        state,
        quantization_config={"quant_method": "lowrank_int8", "group_size": 64},
    )
    with pytest.raises(ValueError, match="has no config.json"):
        quantized_from_pretrained(tmp_path)
