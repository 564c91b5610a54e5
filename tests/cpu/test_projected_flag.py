"""`--projected`: layers whose backward makes R, from the command line, killed and resumed, and in the plan."""

import argparse
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_sys import cli
from lowrank_sys.cli import CommandError
from lowrank_sys.memory.rehearsal import rehearse
from lowrank_sys.train import flags
from lowrank_sys.train.methods import settle

RUN = [
    "--model", "llama-1m", "--rank", "8", "--batch-size", "2", "--seq-len", "32", "--eval-steps", "4", "--save-steps", "2",
    "--eval-tokens", "128", "--device", "cpu", "--warmup-steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in (argparse, copy, shutil, json):
        (folder / f"{module.__name__}.py").write_bytes(Path(module.__file__).read_bytes())
    return folder


def parsed(*words):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args([*RUN, *words])
    flags.check(args)
    args.dtype = "fp32"
    return settle(args)


def train(text, out, *words):
    assert cli.main(["train", *RUN, "--data", str(text), "--out", str(out), *words]) == 0
    return json.loads((out / "summary.json").read_text())


def test_a_run_learns_and_goes_on_from_where_it_was(text, tmp_path):
    words = ["--projected", "right", "--steps", "6", "--update-proj-gap", "2"]
    whole = train(text, tmp_path / "whole", *words)
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert whole["matrices_changed"] == [14, 14] and log[-1]["val_loss"] < log[0]["val_loss"] - 0.2
    assert whole["adamw_state_bytes"] == 8 * 984_000  # of the weights, which get no gradient here

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "step-00000006")
    shutil.rmtree(tmp_path / "again" / "final")
    train(text, tmp_path / "again", *words, "--resume")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "words", (["--update-proj-gap", "2"], ["--method", "q-galore", "--gradient-checkpointing"], ["--per-layer", "accumulate"])
)
def test_the_plan_counts_what_the_layers_keep(words):
    plan, real = (rehearse(parsed(*words, "--projected", "right"), fake=fake) for fake in (True, False))
    dense = rehearse(parsed(*words))
    assert plan.peak == real.peak < dense.peak and plan.rest == real.rest
    assert plan.at_peak == real.at_peak and plan.at_peak["gradients"] < dense.at_peak["gradients"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--projected", "up"], "--projected: unknown 'up'; valid: left, right, auto"),
        (["--projected", "left", "--method", "adamw"], "--projected needs a method with low-rank gradients, got --method adamw"),
        (["--projected", "left", "--proj-type", "right"], "--proj-type right: --projected left says which side"),
    ],
)
def test_refused(words, message):
    with pytest.raises(CommandError, match=message):
        parsed(*words)


def test_a_method_that_needs_the_gradient_is_refused(text, tmp_path, capsys):
    rankless = [word for word in RUN if word not in ("--rank", "8")]
    words = ["train", *rankless, "--data", str(text), "--out", str(tmp_path / "run"), "--projected", "left"]
    assert cli.main([*words, "--method", "apollo", "--rank", "8"]) == 2
    assert "needs a rule that can start from R" in capsys.readouterr().err
    assert cli.main([*words, "--method", "scale", "--out", str(tmp_path / "other")]) == 2
    assert "--projected needs a --rank" in capsys.readouterr().err
