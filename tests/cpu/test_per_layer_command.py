"""lowrank train --per-layer, and --method with quantized states."""

import argparse
import copy
import json
import shutil
from pathlib import Path

import pytest
from lanes import usual

from lowrank_sys import cli


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in (argparse, copy, shutil, json):
        (folder / f"{module.__name__}.py").write_bytes(Path(module.__file__).read_bytes())
    return folder


def command(text, out, *more):
    return cli.main(
        [
            "train",
            "--model",
            "llama-1m",
            "--rank",
            "8",
            "--steps",
            "4",
            "--batch-size",
            "2",
            "--seq-len",
            "32",
            "--update-proj-gap",
            "2",
            "--eval-steps",
            "4",
            "--save-steps",
            "2",
            "--eval-tokens",
            "128",
            "--device",
            "cpu",
            "--warmup-steps",
            "1",
            "--data",
            str(text),
            "--out",
            str(out),
            *more,
        ]
    )


@pytest.mark.parametrize(
    "flags",
    usual(
        [["--per-layer", "in_backward"], ["--method", "q-galore", "--per-layer", "accumulate", "--accumulate-dtype", "bf16"]],
        ["--per-layer", "accumulate", "--gradient-accumulation-steps", "2"],
        ["--method", "q-galore", "--dtype", "bf16"],
        ["--method", "galore8bit", "--per-layer", "in_backward"],
        ["--method", "adamw8bit"],
    ),
    ids=" ".join,
)
def test_lowrank_train(text, tmp_path, flags):
    assert command(text, tmp_path / "run", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert b"low_rank_gradients" not in weights

    # stopped after step 2, in the middle of a gap, and gone on with
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("final", "step-00000004"):
        shutil.rmtree(tmp_path / "again" / name)
    assert command(text, tmp_path / "again", "--resume", *flags) == 0
    assert (tmp_path / "again" / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--per-layer", "twice"], "--per-layer: unknown 'twice'; valid: accumulate, in_backward"),
        (["--per-layer", "accumulate", "--accumulate-dtype", "fp16"], "--accumulate-dtype: unknown 'fp16'; valid: fp32, bf16"),
        (["--accumulate-dtype", "bf16"], "--accumulate-dtype bf16 needs --per-layer accumulate"),
        (["--per-layer", "in_backward", "--gradient-accumulation-steps", "2"], "use --per-layer accumulate"),
        (
            ["--per-layer", "accumulate", "--method", "adamw8bit"],
            "--per-layer needs a method with low-rank gradients, got --method adamw8bit",
        ),
        (["--per-layer", "accumulate", "--method", "adamw"], "--per-layer needs a method with low-rank gradients"),
        (["--per-layer", "accumulate", "--method", "fira"], "needs a rule that can start from R"),
    ],
)
def test_bad_flags(text, tmp_path, capsys, flags, message):
    assert command(text, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
