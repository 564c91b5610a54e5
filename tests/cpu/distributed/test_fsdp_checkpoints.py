"""Distributed checkpoints of sharded weights go on with any number of processes, with one, and back."""

import pytest
import torch.distributed.checkpoint as dcp
import world
from lanes import usual
from sharded import build, shard, states, train, weights
from test_fsdp import METHODS, assert_alike
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def one(method, rank=0, size=1, split=True):
    model = shard(build(), size) if split else build()
    return model, METHODS[method](model)


def pieces(trained):
    """What a checkpoint holds."""
    return {method: dict(zip(("model", "optimizer"), get_state_dict(*pair))) for method, pair in trained.items()}


def go_on(rank, size, methods, folder, first, last, split=True):
    """Load step `first` from the folder, unless it is 0, train, and save step `last`."""
    trained = {method: one(method, rank, size, split) for method in methods}
    if first:
        loaded = pieces(trained)
        dcp.load(loaded, checkpoint_id=f"{folder}/{first}")
        for method, (model, optimizer) in trained.items():
            set_state_dict(model, optimizer, model_state_dict=loaded[method]["model"], optim_state_dict=loaded[method]["optimizer"])
    for model, optimizer in trained.values():
        train(model, optimizer, range(first, last), rank, size)
    dcp.save(pieces(trained), checkpoint_id=f"{folder}/{last}")
    return {method: (weights(model), states(optimizer)) for method, (model, optimizer) in trained.items()}


@pytest.mark.parametrize(
    "methods", usual([["galore in int4", "fira", "grass sampled"]], ["galore", "apollo", "adafactor"]), ids=", ".join
)
def test_a_run_goes_on_with_other_numbers_of_processes(methods, tmp_path):
    for step, size in ((0, 4), (4, 3), (5, 2)):
        world.run(size, go_on, size, methods, str(tmp_path), step, step + (4 if step == 0 else 1), timeout=300)
    go_on(0, 1, methods, str(tmp_path), 6, 8, False)
    ranks = world.run(4, go_on, 4, methods, str(tmp_path), 8, 10, timeout=300)
    whole = {method: one(method, split=False) for method in methods}
    for method, (model, optimizer) in whole.items():
        train(model, optimizer, range(10))
        for rank in range(4):
            got, state = ranks[rank][method]
            where = f"{method} on rank {rank}"
            assert_alike(got, weights(model), ranks[0][method][0], where)
            for i, want in states(optimizer).items():
                assert_alike(state[i], want, ranks[0][method][1][i], f"{where}, parameter {i}")
