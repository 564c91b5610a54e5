"""`lowrank train --nproc`: several processes train as one does, and outlive the death of one of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commanded import exact, final, rows, words
from threads import threads

from lowrank_sys import cli
from lowrank_sys.train import command
from lowrank_sys.train import flags as train_flags

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "--model": "llama-1m", "--method": "q-galore", "--per-layer": "accumulate", "--rank": "8", "--update-proj-gap": "3",
    "--steps": "8", "--seq-len": "32", "--eval-steps": "4", "--save-steps": "2", "--eval-tokens": "256", "--device": "cpu",
    "--warmup-steps": "1", "--data": str(Path(os.__file__).with_name("argparse.py")),
}  # fmt: skip


def flags(out, *more, **changed):
    return ["train", *words({**SMALL, "--out": str(out)}, *more, **changed)]


def start(given, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank_sys", *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    out, temporary = tmp_path_factory.mktemp("two") / "run", tmp_path_factory.mktemp("temporary")
    run = start(flags(out, batch_size=2, nproc=2, keep=9), TMPDIR=str(temporary))
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert said.count("step 8/8") == 1 and said.count("matrices trained") == 1  # one process speaks
    assert not list(temporary.iterdir())  # nothing stays behind
    return out


def test_two_processes_are_one_with_the_whole_batch(two, tmp_path):
    """Each reads windows of its own: together those of a batch twice as large."""
    assert cli.main(flags(tmp_path / "one", batch_size=4)) == 0
    for ours, theirs in zip(rows(two), rows(tmp_path / "one"), strict=True):
        for key in ("loss", "val_loss"):
            assert (ours[key] is None) == (theirs[key] is None)
            assert ours[key] is None or ours[key] == pytest.approx(theirs[key], abs=2e-3), (ours["step"], key)
    told = json.loads((two / "summary.json").read_text())
    assert (told["processes"], told["batch_size_of_a_process"], told["tokens"]) == (2, 2, 8 * 4 * 32)
    assert {path.name for path in two.iterdir()} >= {"final", "metrics.jsonl", "summary.json", "loss.png"}
    assert {path.name for path in (two / "step-00000008").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def children(pid):
    """Their ids, of processes that are Python."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "lowrank_sys" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.full
def test_a_process_that_is_killed_is_started_again(two, tmp_path):
    out = tmp_path / "run"
    run = start(flags(out, batch_size=2, nproc=2))
    while not (out / "step-00000002").exists():
        assert run.poll() is None, "the run ended before a process of it could be killed"
        time.sleep(0.002)
    os.kill(children(run.pid)[1], signal.SIGKILL)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert re.search(r"process [01] was killed by SIGKILL: all 2 start again from step-0000000[2-6] \(1 of 3\)", said), said
    assert exact(out) == exact(two) and final(out) == final(two)


def test_another_number_of_processes_goes_on_with_the_next_windows(two, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(two, out)
    for step in (6, 8):
        shutil.rmtree(out / f"step-0000000{step}")
    assert cli.main(flags(out, "--resume", batch_size=2)) == 0
    said = capsys.readouterr().err
    assert "resuming at step 4" in said and "warning: processes 2 there, 1 here: it goes on, but not to the bit" in said
    assert json.loads((out / "summary.json").read_text())["tokens"] == (4 * 2 * 2 + 4 * 2) * 32
    assert json.loads((out / "step-00000008" / "manifest.json").read_text())["windows"] == 4 * 2 * 2 + 4 * 2
    assert exact(out)[:5] == exact(two)[:5] and rows(out)[-1]["val_loss"] < rows(out)[0]["val_loss"]

    with threads(2):
        assert cli.main(flags(out, "--resume", batch_size=2)) == 0  # nothing is left to do
    assert "warning: threads 1 there, 2 here: it goes on, but not to the bit" in capsys.readouterr().err


@pytest.mark.full
def test_what_the_processes_find_wrong_is_told_once(tmp_path):
    run = start(flags(tmp_path / "run", nproc=2, rank=193, method="galore"))
    said, _ = run.communicate(timeout=300)
    errors = [line for line in said.splitlines() if "error" in line]
    assert run.returncode == 2 and len(errors) == 1 and "193" in errors[0] and "192" in errors[0], said


def test_bad_input(two, tmp_path, capsys):
    for changed, message in [
        ({"nproc": 0}, "--nproc: got 0; it must be at least 1"),
        ({"nproc": 2, "per_layer": "in_backward"}, "--per-layer in_backward runs in one process, got --nproc 2"),
        ({"nproc": 2, "out": two}, "it holds a run already"),
    ]:
        assert cli.main(flags(**{"out": tmp_path / "no", **changed})) == 2
        assert message in capsys.readouterr().err


def test_the_processes_are_given_the_same_flags():
    parser = cli.Parser()
    command.add_arguments(parser)
    given = ["--lr", "0.01", "--target-modules", "q_proj", "k_proj", "--as-given", "--out=-odd name", "--nproc", "2"]
    args = parser.parse_args(given)
    train_flags.check(args)
    again = parser.parse_args(train_flags.words(args))
    assert {**vars(again), "nproc": 2} == vars(args)
