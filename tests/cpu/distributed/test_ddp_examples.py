"""examples/ddp.py and examples/accelerate_loop.py on two processes, each with data of its own."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import world

FOLDER = Path(__file__).resolve().parents[3] / "examples"


def run(rank, name):
    # what a launcher tells accelerate
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models, make = [], module.tiny.model
    module.tiny.model = lambda: models.append(make()) or models[-1]
    losses = module.main()
    return losses, {key: value.clone() for key, value in models[0].state_dict().items()}


@pytest.mark.parametrize("name", ["ddp", "accelerate_loop"])
def test_two_processes_learn_one_model(name):
    (losses, weights), (others, theirs) = world.run(2, run, name)
    assert losses != others and all(torch.equal(value, theirs[key]) for key, value in weights.items())
    assert losses[-1] < 0.9 * losses[0] and others[-1] < 0.9 * others[0]
