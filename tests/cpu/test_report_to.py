"""What a run says while it trains: the progress line, and --report-to."""

import json
import re

import pytest
import torch

from lowrank_sys import backends, cli
from lowrank_sys.train import command

RUN = ("train", "--model", "llama-1m", "--steps", "3", "--batch-size", "1", "--seq-len", "32", "--eval-tokens", "64", "--rank", "4")


@pytest.fixture
def train(tmp_path, capfd):
    """train(flags...) -> (exit code, stderr), in tmp_path / "out", on a small file."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"line {i}, and {i * i} more of it" for i in range(300)))

    def call(*flags):
        code = cli.main([*RUN, "--data", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "out"), *flags])
        return code, capfd.readouterr().err

    return call


def test_the_progress_line_has_loss_speed_memory_and_time_left(train, tmp_path):
    code, told = train("--eval-steps", "1")
    assert code == 0
    line = next(line for line in told.splitlines() if line.startswith("step 2/3: "))
    found = re.fullmatch(r"step 2/3: loss ([\d.]+), val ([\d.]+), [\d,]+ tok/s, ([\d.]+) GiB, [\d,]+ s left", line)
    rows = [json.loads(text) for text in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [float(found[1]), float(found[2])] == [round(rows[2][name], 3) for name in ("loss", "val_loss")]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0.1 < float(found[3]) <= summary["peak_memory_bytes"] / 2**30 + 0.01


def test_tensorboard_gets_every_row(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train("--report-to", "tensorboard", "--eval-steps", "2")[0] == 0
    (events,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    rows = [json.loads(text) for text in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for tag, name in {"train/loss": "loss", "eval/loss": "val_loss", "train/lr": "lr", "train/skipped": "skipped"}.items():
        want = [(row["step"], row[name]) for row in rows if row[name] is not None]
        got = [(event.step, event.value) for event in found.Scalars(tag)]
        assert len(want) >= 2 and [step for step, _ in got] == [step for step, _ in want]
        assert [value for _, value in got] == pytest.approx([value for _, value in want], rel=1e-6)


def test_a_missing_package_and_an_unknown_name_are_one_line(train, tmp_path, monkeypatch):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    code, told = train("--report-to", "wandb")
    assert (code, told) == (1, "lowrank train: error: --report-to wandb: wandb is not installed; pip install wandb brings it\n")
    code, told = train("--report-to", "printer")
    assert (code, told) == (2, "lowrank train: error: --report-to: unknown 'printer'; valid: tensorboard, wandb\n")
    assert not (tmp_path / "out").exists()


def test_what_no_kernel_serves_is_said_in_one_line(monkeypatch):
    assert backends.NATIVE_MISSING or backends.slow("cpu") == ""
    rows = [
        backends.Served("project", "cpu", "C++", ""),
        backends.Served("step", "cpu", "reference", "no C++20 compiler found"),
        backends.Served("adam_8bit_", "cpu", "reference", "no C++20 compiler found"),
        backends.Served("galore_step", "cpu", "reference", "alias of step"),
        backends.Served("int8_linear", "cuda", "reference", "triton needs a C compiler: gcc or clang on PATH, or CC"),
    ]
    monkeypatch.setattr(backends, "table", lambda: rows)
    assert backends.slow("cpu") == (
        "slow: plain PyTorch in place of kernels serves 2 ops (step, adam_8bit_): no C++20 compiler found"
    )
    assert backends.slow("cuda").endswith("serves 1 ops (int8_linear): triton needs a C compiler: gcc or clang on PATH, or CC")


def test_triton_and_cuda_say_what_they_lack(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert backends._load_triton() in ("triton needs a C compiler: gcc or clang on PATH, or CC", "triton is not installed")
    found = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name.endswith("_cuda") else found(name))
    monkeypatch.setattr(backends, "build_record", lambda: {"cuda": "torch is a CPU build"})
    assert backends._load_cuda() == "built without CUDA sources: torch is a CPU build"
