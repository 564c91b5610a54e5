"""LoQT in two processes is LoQT in one with the whole batch: merges, and a run that goes on with parts in its checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commanded import exact, final, rows, words

from lowrank_sys import cli

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
SMALL = {
    "--model": "llama-1m", "--method": "loqt", "--rank": "8", "--update-proj-gap": "2", "--steps": "8", "--seq-len": "32",
    "--eval-steps": "4", "--save-steps": "3", "--eval-tokens": "256", "--device": "cpu", "--warmup-steps": "1",
    "--data": str(Path(os.__file__).with_name("argparse.py")),
}  # fmt: skip


def train(out, *more, **changed):
    given = ["train", *words({**SMALL, "--out": str(out)}, *more, **changed)]
    done = subprocess.run([sys.executable, "-m", "lowrank_sys", *given], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    train(tmp_path / "two", batch_size=2, nproc=2)
    one = ["train", *words({**SMALL, "--out": str(tmp_path / "one")}, batch_size=4, per_layer="accumulate")]
    assert cli.main(one) == 0
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in ("loss", "val_loss"):
            assert ours[key] is None or ours[key] == pytest.approx(theirs[key], abs=2e-3), (ours["step"], key)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["matrices_changed"] == [14, 14]

    shutil.copytree(tmp_path / "two", tmp_path / "cut")
    for old in ("final", "step-00000008"):
        shutil.rmtree(tmp_path / "cut" / old)
    train(tmp_path / "cut", "--resume", batch_size=2, nproc=2)
    assert exact(tmp_path / "cut") == exact(tmp_path / "two") and final(tmp_path / "cut") == final(tmp_path / "two")
