"""`--target-modules`: which linear layers are low-rank, and what becomes of those that cannot be."""

import json

import pytest
import torch
from transformers import LlamaConfig

from lowrank_sys.cli import main

FLAGS = ["--steps", "2", "--batch-size", "2", "--seq-len", "16", "--eval-tokens", "64", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def model(tmp_path):
    """One layer of width 32: k_proj and v_proj have 16 outputs."""
    LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("low-rank gradients " * 500)
    return tmp_path / "config.json"


def train(model, *flags):
    out = model.parent / "run"
    code = main(["train", "--model", str(model), "--data", str(model.parent / "text.txt"), "--out", str(out), *FLAGS, *flags])
    return code, out


def ranks(out):
    """Rank of every matrix of a run: that of its basis."""
    state = torch.load(next(out.glob("**/step-*")) / "optimizer.pt", weights_only=True)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    return {name: state["state"][i]["basis"].shape[1] for name, i in zip(names, ids) if "basis" in state["state"][i]}


def test_the_named_layers_alone(model):
    code, out = train(model, "--rank", "8", "--target-modules", "mlp", "q_proj")
    assert code == 0
    found = ranks(out)
    assert {name.split(".")[-2] for name in found} == {"gate_proj", "up_proj", "down_proj", "q_proj"} and set(found.values()) == {8}
    assert json.loads((out / "summary.json").read_text())["arguments"]["target_modules"] == ["mlp", "q_proj"]


@pytest.mark.filterwarnings("ignore:2 linear layers are narrower")
def test_narrow_layers_train_beside_the_others(model):
    code, out = train(model, "--rank", "24")
    assert code == 0
    assert {name.split(".")[-2] for name in ranks(out)} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adamw_asks_for_no_rank(model):
    assert train(model, "--method", "adamw")[0] == 0


def test_int8_follows(model, capsys):
    assert train(model, "--method", "q-galore", "--rank", "8", "--target-modules", "mlp")[0] == 0


@pytest.mark.parametrize("flags", [["--method", "galore"], ["--method", "q-galore"]], ids=lambda flags: flags[1])
def test_a_name_that_no_layer_has(model, capsys, flags):
    assert train(model, *flags, "--rank", "8", "--target-modules", "conv")[0] == 2
    assert "conv" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.full
def test_a_plan_knows_them(model, capsys):
    assert main(["plan", "--model", str(model), "--rank", "8", "--target-modules", "mlp", "--device-memory", "24GiB", *FLAGS]) == 0
