"""Methods from the command line."""

import json

import pytest
from commanded import modules, rows
from lanes import usual

from lowrank_sys import cli
from lowrank_sys.memory import process
from lowrank_sys.optim.preset import METHODS


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return modules(tmp_path_factory.mktemp("text"), "ast", "argparse", "copy", "difflib", "shutil")


@pytest.mark.parametrize("weights", usual(["int8"], "float"))
@pytest.mark.parametrize("name", ["fira-lion", "coap", "ldadam", "scale", "sinkgd"])
def test_it_trains_from_the_command_line(name, weights, text, tmp_path):
    words = ["--method", name, "--model", "llama-1m", "--steps", "3", "--batch-size", "2", "--seq-len", "32", "--weights", weights]
    places = ["--data", str(text), "--out", str(tmp_path / "run"), "--device", "cpu", "--eval-tokens", "64", "--warmup-steps", "1"]
    assert cli.main(["train", *words, *places]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = rows(tmp_path / "run")
    assert summary["method"] == name and summary["steps"] == 3 and summary["skipped"] == 0
    assert found[-1]["val_loss"] < found[0]["val_loss"]


@pytest.mark.parametrize("name", ["ldadam", "scale"])
def test_it_is_planned(name, capsys, monkeypatch):
    monkeypatch.setattr(process, "measure", lambda args: process.Baseline(2**30, 2**30, True))
    words = ["--method", name, "--model", "llama-1m", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--json"]
    assert cli.main(["plan", *words, "--device-memory", "8GiB"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert tensors["moments"] > 0 and (tensors["basis"] > 0) == (METHODS[name].rank is not None)


@pytest.mark.parametrize("name", ["scale", "sinkgd"])
def test_a_rank_of_a_method_without_one_is_an_error_of_the_command_line(name, text, tmp_path, capsys):
    words = ["--method", name, "--rank", "8", "--model", "llama-1m", "--data", str(text), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words, "--steps", "1", "--device", "cpu"]) != 0
    assert "rank must be None" in capsys.readouterr().err
