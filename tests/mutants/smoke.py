"""python smoke.py CASE: trains a case of tests/golden/runner.py, resumed half way, and prints its losses and a digest as JSON."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
import runner


def mean_loss(run):
    """Of the batches that it trains on."""
    with torch.no_grad():
        return sum(run.loss(runner.batch(time)).item() for time in range(runner.STEPS)) / runner.STEPS


def main(case):
    torch.set_num_threads(1)
    first = runner.Run(*runner.cases()[case])
    before = mean_loss(first)
    for _ in range(runner.SAVED):
        first.step()
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder, "saved.pt"))
        run = runner.Run(*runner.cases()[case])
        run.load(Path(folder, "saved.pt"))
    while run.time < runner.STEPS:
        run.step()
    digest = hashlib.sha256(repr(sorted(run.tensors().items())).encode()).hexdigest()
    print(json.dumps({"before": before, "after": mean_loss(run), "digest": digest}))


if __name__ == "__main__":
    main(sys.argv[1])
