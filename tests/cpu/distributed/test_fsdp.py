"""Training on weights sharded by fully_shard is training in one process, to rounding, with other tokens on every rank."""

import pytest
import torch
import world
from sharded import EPS, build, groups, shard, states, train, weights

from lowrank_sys import optim
from lowrank_sys.optim import param_groups, preset

STEPS = 8


def adam(cls, _keys=(), **options):
    return lambda model: cls(groups(model, **dict(_keys)), lr=1e-2, eps=EPS, **options)


METHODS = {
    "galore": adam(optim.GaLoreAdamW, weight_decay=0.1),
    "galore rotated": adam(optim.GaLoreAdamW, {"moments": "rotate"}),
    "galore from sketches": adam(optim.GaLoreAdamW, {"refresh": "next"}),
    "galore in int4": adam(optim.QGaLoreAdamW8bit, {"cos_threshold": 0.1, "queue_size": 1, "update_proj_gap": 2}),
    "apollo": adam(optim.APOLLOAdamW),
    "apollo svd": adam(optim.APOLLOAdamW, {"proj": "svd"}),
    "apollo unlimited": adam(optim.APOLLOAdamW, disable_nl=True),
    "apollo-mini": adam(optim.APOLLOAdamW, {**optim.APOLLOAdamW.mini, "scale": 1.0}),
    "fira": adam(optim.FiraAdamW),
    "fira in int4": adam(optim.FiraAdamW, {"quant": True}),
    "frugal": adam(optim.FrugalAdamW, inactive_update_rule="sgd"),
    "grass": adam(optim.GrassAdamW),
    "grass sampled": adam(optim.GrassAdamW, {"subspace": "sample"}),
    "adafactor": lambda model: optim.GaLoreAdafactor(groups(model), lr=0.3, relative_step=False, beta1=0.9),
    "fira-lion": lambda model: preset.METHODS["fira-lion"].optimizer(groups(model), lr=1e-2),
    "error feedback": lambda model: preset.METHODS["ldadam"].optimizer(
        groups(model, subspace="randomized", moments="keep"), lr=1e-2, eps=EPS
    ),
    "sinkgd": lambda model: optim.SinkGD(param_groups(model, rank=None), lr=1e-2, eps=EPS),
    "scale": lambda model: optim.SCALE(columns(model), lr=1e-2, eps=EPS),
}


SOME = ["galore", "galore from sketches", "apollo-mini", "fira", "adafactor"]


def columns(model):
    """Two matrices by columns, one with momentum."""
    plain, matrices = param_groups(model, rank=None)
    some = {**matrices, "params": matrices["params"][:2], "over": "columns", "momentum": 0.9}
    return [plain, {**matrices, "params": matrices["params"][2:]}, some]


def trained(method, model, rank=0, size=1):
    optimizer = METHODS[method](model)
    train(model, optimizer, range(STEPS), rank, size)
    return weights(model), states(optimizer)


def on_ranks(rank, size, replicas, methods):
    return {method: trained(method, shard(build(), size, replicas), rank, size) for method in methods}


def assert_alike(got, wanted, first, where):
    """Numbers to rounding, which ten steps and a basis of close singular values amplify; all else exactly."""
    for key, want in wanted.items():
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            torch.testing.assert_close(got[key], want, atol=2e-4, rtol=2e-3, msg=lambda m: f"{where}: {key}: {m}", equal_nan=True)
        else:
            assert torch.equal(torch.as_tensor(got[key]), torch.as_tensor(want)), f"{where}: {key}"
        same = torch.equal(*(torch.as_tensor(value[key]).float().nan_to_num() for value in (got, first)))
        assert same, f"{where}: {key} differs between ranks"


@pytest.mark.parametrize("size, replicas, methods", [(4, 1, list(METHODS)), (2, 1, SOME), (4, 2, SOME)], ids=["4", "2", "2 x 2"])
def test_ranks_train_as_one_process(size, replicas, methods):
    ranks = world.run(size, on_ranks, size, replicas, methods, timeout=300)
    for method in methods:
        wanted, kept = trained(method, build())
        start = weights(build())
        assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted if "weight" in name)  # it does train
        for rank, results in enumerate(ranks):
            got, state = results[method]
            assert_alike(got, wanted, ranks[0][method][0], f"{method} on rank {rank}")
            for i, want in kept.items():
                assert_alike(state[i], want, ranks[0][method][1][i], f"{method} on rank {rank}, parameter {i}")
