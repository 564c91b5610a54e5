"""What `lowrank train` takes by itself where INT8 weights would not fit, on small models and a memory that is made up."""

import argparse
import json
import shutil

import pytest
import torch
from commanded import final, modules

from lowrank_sys import cli
from lowrank_sys.cli import CommandError
from lowrank_sys.memory import fit, rehearsal
from lowrank_sys.train import flags
from lowrank_sys.train.methods import settle

LEAN = {"gradient_checkpointing": True, "per_layer": "in_backward"}


def arguments(**changes):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    small = {"model": "llama-1m", "method": "q-galore", "rank": 32, "batch_size": 8, "seq_len": 64, "device": "cpu",
             "dtype": "bf16"}  # fmt: skip
    args = parser.parse_args([])
    vars(args).update({**small, **changes})
    flags.check(args)
    return settle(args)


REHEARSED = {}


def rehearse(args):
    """A run is rehearsed once."""
    words = repr(sorted(vars(args).items()))
    if words not in REHEARSED:
        REHEARSED[words] = rehearsal.rehearse(args)
    return REHEARSED[words]


def size(args, **changes):
    args = argparse.Namespace(**{**vars(args), **changes})
    return fit.needed(args, rehearse(args))


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Arguments of the rehearsals."""
    seen = []
    monkeypatch.setattr(fit, "rehearse", lambda args: seen.append(args) or rehearse(args))
    return seen


@pytest.mark.parametrize("batch_size", [1, 32], ids=["gradients", "activations"])
def test_the_mildest_change_that_fits(batch_size, counted):
    """Gradients outweigh activations, and the reverse."""
    args = arguments(batch_size=batch_size)
    changes = [{}, {"gradient_checkpointing": True}, {"per_layer": "in_backward"}, LEAN]
    sizes = [size(args, **change) for change in changes]
    assert sizes[3] == min(sizes) < sizes[0]
    for memory in (*sizes, *(s - 1 for s in sizes), 2 * sizes[0]):
        counted.clear()
        expected = next((change for change, planned in zip(changes, sizes) if planned <= memory), None)
        lines = []
        if expected is None:
            with pytest.raises(CommandError, match="memory: .* planned as given, .* with --gradient-checkpointing .*--as-given"):
                fit.choose(args, memory, lines.append)
            assert lines == []
            continue
        assert fit.choose(args, memory, lines.append) == expected
        assert len(lines) == bool(expected) and len(counted) <= 1 + changes.index(expected)
        for line in lines:
            assert "\n" not in line and "planned as given" in line
            assert all(f"--{name.replace('_', '-')}" in line for name in expected)


def test_what_was_given_wins(counted):
    for given in ({"method": "galore"}, {"as_given": True}, LEAN, {"weights": "float"}):
        assert fit.choose(arguments(**given), 1) == {}
    assert counted == []
    for given in ({"per_layer": "accumulate"}, {"gradient_checkpointing": True}):
        args = arguments(batch_size=16, **given)
        other = {name: value for name, value in LEAN.items() if name not in given}
        assert fit.choose(args, size(args, **other)) == other


def test_micro_batches_accumulate():
    args = arguments(gradient_accumulation_steps=2, seq_len=16, batch_size=1)
    assert fit.choose(args, size(args, per_layer="accumulate")) == {"per_layer": "accumulate"}
    args = arguments(gradient_accumulation_steps=2, method="apollo", weights="int8")  # whose rule needs the whole gradient
    assert fit.choose(args, size(args, gradient_checkpointing=True)) == {"gradient_checkpointing": True}
    with pytest.raises(CommandError, match="with --gradient-checkpointing,"):
        fit.choose(args, size(args, gradient_checkpointing=True) - 1)


def test_a_gpu_needs_its_context():
    args = arguments(device="cuda")
    run = rehearse(args)
    assert fit.needed(args, run) == fit.CUDA_CONTEXT + round(1.05 * run.peak)
    assert fit.device_memory(torch.device("cpu")) > 2**20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return modules(tmp_path_factory.mktemp("text"), "argparse", "shutil", "copy")


def train(text, out, *more):
    return cli.main([
        "train", "--model", "llama-1m", "--method", "q-galore", "--rank", "8", "--steps", "4", "--batch-size", "2",
        "--seq-len", "32", "--update-proj-gap", "2", "--eval-steps", "4", "--save-steps", "2", "--eval-tokens", "128",
        "--device", "cpu", "--data", str(text), "--out", str(out), *more])  # fmt: skip


def test_the_command_takes_says_and_remembers(text, tmp_path, monkeypatch, capsys):
    args = arguments(model="llama-1m", rank=8, batch_size=2, seq_len=32, dtype="fp32", data=str(text), eval_tokens=128)
    memory = size(args, **LEAN)
    monkeypatch.setattr(fit, "device_memory", lambda device: memory)
    assert train(text, tmp_path / "run") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory:")]
    assert len(said) == 1 and "takes --gradient-checkpointing --per-layer in_backward" in said[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["arguments"]["per_layer"] == "in_backward"
    weights = final(tmp_path / "run")
    assert train(text, tmp_path / "typed", "--gradient-checkpointing", "--per-layer", "in_backward") == 0
    assert final(tmp_path / "typed") == weights

    # gone on with where there is more room, and less: as it began
    for room in (2**40, 1):
        memory = room
        again = tmp_path / f"again{room}"
        shutil.copytree(tmp_path / "run", again)
        for name in ("final", "step-00000004"):
            shutil.rmtree(again / name)
        assert train(text, again, "--resume") == 0
        assert final(again) == weights
    assert train(text, tmp_path / "run", "--resume", "--as-given") == 2
    assert "--per-layer in_backward there, None here" in capsys.readouterr().err

    assert train(text, tmp_path / "none") == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "memory:" in line]) == 1 and "--as-given runs all the same" in said[-1]
    assert not (tmp_path / "none" / "metrics.jsonl").exists()
    assert train(text, tmp_path / "none", "--as-given") == 0
