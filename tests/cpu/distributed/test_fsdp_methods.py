"""The methods beside GaLore's on weights sharded by fully_shard: as one process, to rounding."""

import pytest
import world
from lanes import usual
from sharded import EPS, GAP, RANK, build, shard, states, train, weights
from test_fsdp import assert_alike

from lowrank_sys.optim import param_groups
from lowrank_sys.optim.preset import METHODS

ADAM = {"eps": EPS}
# name: (method, keys of its groups, arguments)
SETTINGS = {
    "svd": ("galore", {"subspace": "svd"}, ADAM),
    "random": ("frugal", {"subspace": "random"}, {**ADAM, "inactive_update_rule": "sgd"}),
    "dct": ("dct", {}, ADAM),
    "dct by l2": ("dct", {"subspace": "l2", "update_proj_gap": GAP}, ADAM),
    "sara": ("sara", {"subspace": "sara"}, ADAM),
    "osd": ("osd", {"update_proj_gap": 1}, ADAM),
    "subtrack": ("subtrack", {"geodesic_step": 1.0}, ADAM),
    "coap": ("coap", {"reproject_factor": 2}, ADAM),
    "ldadam": ("ldadam", {"update_proj_gap": 1}, ADAM),
    "snsm": ("snsm", {}, ADAM),
    "flora": ("flora", {}, {}),
    "gradnormlorp": ("gradnormlorp", {}, ADAM),
    "muon": ("muon", {}, {}),
    "muon whole": ("muon", {"rank": None}, {}),
    "ranks by a rule": ("galore", {"rank": lambda name, weight: 2 if "1.2" in name else 4}, ADAM),
}
STEPS = 8


def trained(name, model, rank=0, size=1):
    method, keys, arguments = SETTINGS[name]
    keys = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "right", **keys}
    keys = {"rank": None} if keys["rank"] is None else keys
    optimizer = METHODS[method].optimizer(param_groups(model, **keys), lr=1e-2, **arguments)
    train(model, optimizer, range(STEPS), rank, size)
    return weights(model), states(optimizer)


def on_ranks(rank, size, names):
    return {name: trained(name, shard(build(), size), rank, size) for name in names}


@pytest.mark.parametrize("size", usual([4], 2))
def test_ranks_train_as_one_process(size):
    ranks = world.run(size, on_ranks, size, list(SETTINGS), timeout=300)
    start = weights(build())
    for name in SETTINGS:
        wanted, kept = trained(name, build())
        assert all((wanted[key] - start[key]).abs().max() > 1e-3 for key in wanted if "weight" in key)  # it does train
        for rank, results in enumerate(ranks):
            got, state = results[name]
            assert_alike(got, wanted, ranks[0][name][0], f"{name} on rank {rank}")
            for i, want in kept.items():
                assert_alike(state[i], want, ranks[0][name][1][i], f"{name} on rank {rank}, parameter {i}")
