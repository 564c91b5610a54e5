"""Families whose logits, experts or layers are not LLaMA's: their loss without logits, their INT8 weights, their plans."""

import json
import warnings

import pytest
import torch
from families import config
from lanes import usual
from rehearsed import assert_rests_as_planned
from test_planner import arguments
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_sys import cli
from lowrank_sys.memory import rehearsal
from lowrank_sys.nn import causal_lm_loss, quantize_model
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.readout import Readout, readout

FAMILIES = ["nanochat", "vaultgemma", "cohere2", "hyperclovax", "granitemoe", "olmoe", "falcon_mamba", "mpt", "openai-gpt"]
READOUTS = {
    "nanochat": Readout(1.0, 7.5),
    "vaultgemma": Readout(1.0, 30.0),
    "cohere2": Readout(0.25),
    "hyperclovax": Readout(0.5),
    "granitemoe": Readout(0.25),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


def written(folder, family):
    config(family).save_pretrained(folder)
    return folder / "config.json"


def build(folder, family, **changes):
    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(written(folder, family))
    for key, value in changes.items():
        setattr(settings, key, value)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(4)  # logits far enough from 0 for a cap to matter
    return model


def batch(vocabulary=301):
    ids = torch.randint(3, vocabulary, (2, 20), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(20) % 7 == 6, -100)


def assert_same_loss(model, ids, labels, **options):
    """Loss and gradients of causal_lm_loss are those of the model's own forward."""
    theirs = model(input_ids=ids, labels=labels).loss
    ours = causal_lm_loss(model, ids, labels, **options)
    assert abs(ours - theirs) <= 2e-6 * theirs
    params = list(model.parameters())
    got, want = (torch.autograd.grad(loss, params, allow_unused=True) for loss in (ours, theirs))
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item() + 1e-12, msg=lambda m: f"{name}: {m}")


@EACH
def test_the_loss_of_a_family_is_its_own(tmp_path, family):
    model = build(tmp_path, family)
    found = readout(model)
    assert found == READOUTS.get(family, Readout())
    ids, labels = batch()
    assert_same_loss(model, ids, labels, tokens=9, vocabulary=50)
    if found != Readout():  # and not by chance
        logits = model(input_ids=ids).logits
        z = model.lm_head(model.base_model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(logits, found(z))
        assert (logits - z).abs().max() > 0.01 * z.abs().max()


def test_other_heads_and_losses_are_left_to_the_model(tmp_path):
    ids, labels = batch()
    balanced = build(tmp_path, "granitemoe", output_router_logits=True, router_aux_loss_coef=0.5)
    assert readout(balanced) is None
    assert_same_loss(balanced, ids, labels)

    deep = build(tmp_path, "cohere2")
    deep.lm_head = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 301))
    assert readout(deep) is None
    assert_same_loss(deep, ids, labels)

    class Shifted(type(build(tmp_path, "olmoe"))):
        def forward(self, **inputs):
            out = super().forward(**inputs)
            return type(out)(loss=out.loss, logits=out.logits + torch.arange(301.0))

    shifted = build(tmp_path, "olmoe")
    shifted.__class__ = Shifted
    assert readout(shifted) is None
    # what was replaced to find this out is back
    for model in (balanced, deep, shifted):
        assert "forward" not in vars(model.base_model) and "forward" not in vars(model.get_output_embeddings())


def test_a_readout_needs_no_values(tmp_path):
    settings = AutoConfig.from_pretrained(written(tmp_path, "nanochat"))
    with torch.device("meta"):
        assert readout(AutoModelForCausalLM.from_config(settings)) == READOUTS["nanochat"]


@EACH
def test_int8_weights_compute_what_the_floats_did(tmp_path, family):
    model = build(tmp_path, family)
    ids, labels = batch()
    before = model(input_ids=ids).logits
    if family == "openai-gpt":
        with pytest.raises(ValueError, match="no linear layer to quantize"):
            quantize_model(model)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quantize_model(model)
    stacks = [name for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
    said = [str(w.message) for w in told if "several matrices each" in str(w.message)]
    assert len(said) == bool(stacks) and all(f"{len(stacks)} parameters" in line for line in said)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    after = model(input_ids=ids).logits
    assert (after - before).norm() < 0.1 * before.norm()
    loss = causal_lm_loss(model, ids, labels)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_weights_that_others_read_stay_float():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read, self.asked = (nn.Linear(64, 64) for _ in range(3))
            nn.init.ones_(self.called.weight)

        def forward(self, x):
            return self.called(x) @ self.read.weight.T + self.asked(x.to(self.asked.weight.dtype))

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 64)
    before = model(x)
    quantize_model(model)
    assert [type(m) for m in (model.called, model.read, model.asked)] == [QuantLinear, nn.Linear, QuantLinear]
    assert (model(x) - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("method", ["galore", "q-galore"])
@pytest.mark.parametrize("family", usual(["olmoe"], *(family for family in FAMILIES if family != "olmoe")))
def test_a_family_is_planned(tmp_path, capsys, family, method):
    words = ["--method", method, "--rank", "4", "--batch-size", "1", "--seq-len", "16", "--dtype", "fp32", "--device", "cuda"]
    assert cli.main(["plan", "--json", "--model", str(written(tmp_path, family)), *words]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    count = sum(p.numel() for p in build(tmp_path, family).parameters())
    stays_float = method == "galore" or family == "openai-gpt"
    assert count <= facts["tensors"]["weights"] and (not stays_float or 4 * count <= facts["tensors"]["weights"] < 5 * count)
    assert ("weights: stay float" in err) == (stays_float and method == "q-galore")
    assert (facts["activations_with_checkpointing_bytes"] is None) == (family == "openai-gpt")
    if family == "openai-gpt" and method == "q-galore":
        assert cli.main(["plan", "--model", str(tmp_path / "config.json"), *words, "--gradient-checkpointing"]) == 2
        assert capsys.readouterr().err.count("error: --gradient-checkpointing: OpenAIGPTLMHeadModel") == 1
        assert cli.main(["plan", "--model", str(tmp_path / "config.json"), *words, "--weights", "int8"]) == 2
        assert capsys.readouterr().err.count("error: model has no linear layer to quantize") == 1


@pytest.mark.parametrize("family, method", usual([("olmoe", "galore")], ("granitemoe", "q-galore"), ("vaultgemma", "q-galore")))
def test_a_rehearsed_family_has_the_peak_of_the_real_run(tmp_path, family, method):
    args = arguments(model=str(written(tmp_path, family)), method=method, batch_size=2, seq_len=64, rank=8)
    fake, real = rehearsal.rehearse(args), rehearsal.rehearse(args, fake=False)
    assert fake.peak == pytest.approx(real.peak, rel=0.05)
    assert_rests_as_planned(fake, real, rel=0.005)
    assert fake.at_peak["weights"] == real.at_peak["weights"]


@pytest.mark.parametrize("family", usual(["granitemoe"], "nanochat", "openai-gpt"))
def test_a_family_trains(tmp_path, capsys, family):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    code = cli.main([
        "train", "--model", str(written(tmp_path, family)), "--method", "q-galore", "--rank", "4", "--steps", "2",
        "--batch-size", "2", "--seq-len", "16", "--eval-steps", "2", "--eval-tokens", "64", "--save-steps", "2", "--device", "cpu",
        "--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["val_loss"] < 20 and summary["matrices_changed"][0] == summary["matrices_changed"][1] > 0
    assert summary["arguments"]["weights"] == ("float" if family == "openai-gpt" else "int8")
