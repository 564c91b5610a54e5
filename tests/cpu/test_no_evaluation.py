"""`--eval-tokens 0`: the same training, with no loss but that of the batches."""

import json
from pathlib import Path

import pytest

from lowrank_sys import cli
from lowrank_sys.train import trainer


@pytest.fixture
def evaluations(monkeypatch):
    counted, real = [], trainer.mean_loss
    monkeypatch.setattr(trainer, "mean_loss", lambda *inputs: counted.append(inputs) or real(*inputs))
    return counted


def test_a_run_without_evaluation_trains_the_same(tmp_path, evaluations, capsys):
    def run(tokens):
        out = tmp_path / f"{tokens}"
        words = ["--model", "llama-1m", "--rank", "4", "--steps", "2", "--batch-size", "1", "--seq-len", "16", "--device", "cpu",
                 "--data", str(Path(__file__).parents[1]), "--eval-tokens", str(tokens), "--out", str(out)]  # fmt: skip
        evaluations.clear()
        assert cli.main(["train", *words]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return json.loads((out / "summary.json").read_text()), rows, (out / "final" / "model.safetensors").read_bytes()

    with_, seen, expected = run(16)
    assert len(evaluations) == 3 and with_["val_loss"] > 0
    without, rows, weights = run(0)
    assert not evaluations and weights == expected
    assert without["val_loss"] is without["train_loss"] is None
    assert capsys.readouterr().out.count("validation loss") == 1
    assert [row["loss"] for row in rows] == [row["loss"] for row in seen] and all(row["val_loss"] is None for row in rows)


def test_a_plan_without_evaluation_rehearses_none(tmp_path, evaluations):
    words = ["--model", "llama-1m", "--rank", "4", "--batch-size", "1", "--seq-len", "16", "--device", "cuda", "--json"]
    assert cli.main(["plan", *words, "--eval-tokens", "0"]) == 0
    assert not evaluations
    assert cli.main(["plan", *words]) == 0
    assert evaluations
