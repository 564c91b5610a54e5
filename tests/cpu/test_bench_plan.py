"""`lowrank bench plan`: a plan beside real runs."""

import json

import pytest

from lowrank_sys import cli


@pytest.mark.full
def test_plan_and_run(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    argv = [
        "bench",
        "plan",
        "--models",
        "llama-1m",
        "--json",
        str(tmp_path / "rows.json"),
        "--",
        "--data",
        str(tmp_path / "text"),
        "--seq-len",
        "32",
        "--eval-tokens",
        "64",
        "--method",
        "q-galore",
        "--rank",
        "8",
    ]
    assert cli.main(argv) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["tensor_peak_bytes"] == pytest.approx(row["counted_tensor_peak_bytes"], rel=0.05)
    assert row["peak_bytes"] == pytest.approx(row["real_peak_bytes"], rel=0.1)
    assert row["command"].startswith("lowrank train --model llama-1m --steps 2 --device cpu --data ")
    assert "llama-1m" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [(["--", "--out", "here"], "--out: lowrank bench plan sets it itself"), (["--", "--rank", "none"], "ended with code 2")],
)
def test_bad_input(flags, message, capsys):
    assert cli.main(["bench", "plan", *flags]) in (1, 2)
    assert message in capsys.readouterr().err
