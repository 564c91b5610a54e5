"""`lowrank bench train`: real short runs, their table, plot and rows; nothing runs twice."""

import json

import pytest

from lowrank_sys import cli

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    return ["bench", "train", "--model", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "runs")], [
        "--",
        "--data",
        str(tmp_path / "text"),
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--seq-len",
        "16",
        "--rank",
        "4",
        "--eval-tokens",
        "64",
        "--eval-steps",
        "1",
    ]


@pytest.mark.full
def test_a_run_for_each_seed(flags, tmp_path, capsys):
    command, rest = flags
    outputs = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    argv = [*command, "--methods", "galore", "--seeds", "0,1", *outputs, *rest]
    assert cli.main(argv) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    summaries = [json.loads((tmp_path / "runs" / f"tiny-galore-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert row["method"] == "galore" and row["losses"] == [summary["val_loss"] for summary in summaries]
    assert row["val_loss"] == pytest.approx(sum(row["losses"]) / 2) and row["val_loss_deviation"] > 0
    assert row["optimizer_state_bytes"] == summaries[0]["optimizer_state_bytes"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out
    assert first.count("lowrank train ") == 2 and "galore" in first

    assert cli.main(argv) == 0
    assert "lowrank train " not in capsys.readouterr().out.replace("lowrank bench train ", "")
    assert cli.main([*argv, "--lr", "0.5"]) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (["--methods", "galore,adma"], "--methods: unknown 'adma'"),
        (["--seeds", "0,x"], "--seeds: got '0,x'"),
        (["--", "--seed", "3"], "--seed: lowrank bench train sets it itself"),
        (["--methods", "galore", "--", "--rank", "none"], "ended with code 2"),
    ],
)
def test_bad_input(flags, change, message, capsys):
    code = cli.main([*flags[0], *change])
    assert code in (1, 2) and message in capsys.readouterr().err
