"""lowrank train --per-layer, and --method with quantized states."""

import shutil

import pytest
from commanded import final, modules, rows, words
from lanes import usual

from lowrank_sys import cli

SMALL = {
    "--model": "llama-1m", "--rank": "8", "--steps": "4", "--batch-size": "2", "--seq-len": "32", "--update-proj-gap": "2",
    "--eval-steps": "4", "--save-steps": "2", "--eval-tokens": "128", "--device": "cpu", "--warmup-steps": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return modules(tmp_path_factory.mktemp("text"), "argparse", "copy", "shutil", "string")


def command(text, out, *more):
    return cli.main(["train", *words(SMALL, *more, data=text, out=out)])


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
    found = rows(tmp_path / "run")
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.1
    assert b"low_rank_gradients" not in final(tmp_path / "run")

    # stopped after step 2, in the middle of a gap, and gone on with
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("final", "step-00000004"):
        shutil.rmtree(tmp_path / "again" / name)
    assert command(text, tmp_path / "again", "--resume", *flags) == 0
    assert final(tmp_path / "again") == final(tmp_path / "run")


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
