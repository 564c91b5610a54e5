"""kill -9 at any moment of `lowrank train`: it goes on to the bit."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from commanded import exact, final, words

from lowrank_sys import cli

SMALL = {
    "--model": "llama-1m", "--method": "galore8bit", "--rank": "8", "--steps": "6", "--batch-size": "1", "--seq-len": "32",
    "--update-proj-gap": "3", "--eval-steps": "3", "--save-steps": "1", "--eval-tokens": "128", "--device": "cpu",
    "--warmup-steps": "1", "--data": str(Path(os.__file__).with_name("argparse.py")),
}  # fmt: skip
# Imported once, in a process that every run is a fork of: most of a run is then training and saving.
PRELOAD = ["lowrank_sys.train.command", "lowrank_sys.train.trainer", "transformers.models.llama.modeling_llama"]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOAD)


def start(out):
    run = FORKED.Process(target=_train, args=(["train", *words(SMALL, "--resume", out=out)], f"{out}.txt"))
    run.start()
    return run


def _train(given, said):
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    raise SystemExit(cli.main(given))


def found(out):
    """What a run leaves: its rows, its final weights, and the state of its optimizer."""
    state = torch.load(out / "step-00000006" / "optimizer.pt")["state"]
    tensors = {(i, key): value for i, one in state.items() for key, value in one.items() if isinstance(value, torch.Tensor)}
    return exact(out), final(out), tensors


def assert_found(out, whole):
    rows, weights, tensors = found(out)
    assert rows == whole[0] and weights == whole[1] and tensors.keys() == whole[2].keys()
    assert all(torch.equal(value, whole[2][key]) for key, value in tensors.items())


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_it_goes_on_to_the_bit(kills, tmp_path):
    """Killed at random moments, over and over; what is finished is begun anew."""
    imports = FORKED.Process(target=int)  # no part of the span of a run
    imports.start()
    imports.join()
    began, run = time.monotonic(), start(tmp_path / "whole")
    run.join()
    assert run.exitcode == 0, (tmp_path / "whole.txt").read_text()
    span, whole = time.monotonic() - began, found(tmp_path / "whole")
    moments, runs, died = random.Random(kills), 0, 0
    while died < kills:
        out = tmp_path / f"run {runs}"
        run = start(out)
        run.join(moments.uniform(0.1, 1) * span)
        run.kill()
        run.join()
        assert run.exitcode in (0, -9), Path(f"{out}.txt").read_text()
        died += run.exitcode == -9
        if run.exitcode == 0:
            assert_found(out, whole)
            runs += 1
    out = tmp_path / f"run {runs}"
    run = start(out)
    run.join()
    assert run.exitcode == 0, Path(f"{out}.txt").read_text()
    assert_found(out, whole)
