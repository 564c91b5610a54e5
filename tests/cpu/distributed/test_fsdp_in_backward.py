"""per_layer='in_backward' on sharded weights, whose hooks run when a gradient is averaged; and how many messages a step is."""

import functools

import pytest
import torch
import torch.distributed as dist
import world
from sharded import EPS, backward, build, groups, shard, train, weights

from lowrank_sys import optim
from lowrank_sys.optim.in_backward import InBackward

SIZE = 2


def clipped():
    return InBackward(max_norm=0.05)


METHODS = {
    "galore": (optim.GaLoreAdamW, {}, lambda: "in_backward"),
    "galore clipped": (optim.GaLoreAdamW, {}, clipped),
    "fira clipped": (optim.FiraAdamW, {}, clipped),
    "apollo-mini": (optim.APOLLOAdamW, {**optim.APOLLOAdamW.mini, "scale": 1.0}, lambda: "in_backward"),
}
LIMITED = {"fira": optim.FiraAdamW, "apollo": optim.APOLLOAdamW}


def trained(name, model, rank=0, size=1):
    cls, keys, per_layer = METHODS[name]
    optimizer = cls(groups(model, **keys), lr=1e-2, eps=EPS, per_layer=per_layer())
    left = []

    def look(step):
        left.append([i for i, group in enumerate(optimizer.param_groups) for p in group["params"] if p.grad is not None])

    train(model, optimizer, range(5), rank, size, look)
    low = [i for i, group in enumerate(optimizer.param_groups) if "rank" in group]
    assert all(left) and not any(i in low for one in left for i in one)  # the gradients of matrices are gone before the step
    return weights(model)


def accumulated(model, per_layer=None, rank=0, size=1):
    """After a step on two micro-batches, the first of which is not averaged yet."""
    optimizer = optim.GaLoreAdamW(groups(model), lr=1e-2, eps=EPS, per_layer=per_layer)
    for last, parts in ((False, torch.arange(6)), (True, torch.arange(6, 12))):
        if size > 1:
            model.set_requires_gradient_sync(last)
        backward(model, 0, parts.chunk(size)[rank])
    optimizer.step()
    return weights(model)


def noted(sent, what, collective, *args, **options):
    sent.append(what)
    return collective(*args, **options)


def messages(cls, size, rank):
    """How many messages the optimizer sends in a step between two refreshes."""
    model = shard(build(), size)
    optimizer = cls(groups(model, update_proj_gap=50), lr=1e-2, eps=EPS)
    mine, sent = torch.arange(12).reshape(size, -1)[rank], []
    for step in range(5):
        backward(model, step, mine)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "broadcast"):
                patch.setattr(dist, name, functools.partial(noted, sent, (step, name), getattr(dist, name)))
            optimizer.step()
        optimizer.zero_grad()
    return [name for step, name in sent if step == 4]


def on_ranks(rank):
    found = {name: trained(name, shard(build(), SIZE), rank, SIZE) for name in METHODS}
    sent = {name: messages(cls, SIZE, rank) for name, cls in LIMITED.items()}
    found["micro-batches"] = accumulated(shard(build(), SIZE), "in_backward", rank, SIZE)
    model = shard(build(), SIZE)
    optimizer = optim.GaLoreAdamW(groups(model), lr=1e-2, per_layer="in_backward")
    backward(model, 0, torch.arange(6))
    with pytest.raises(RuntimeError, match=r"a second backward before step\(\)"):
        backward(model, 0, torch.arange(6))
    assert optimizer.skipped() == 0
    with pytest.raises(RuntimeError, match="runs in one process, got 2.*fully_shard"):
        optim.GaLoreAdamW(groups(build()), lr=1e-2, per_layer="in_backward")
    return found, sent


@pytest.fixture(scope="module")
def ranks():
    return world.run(SIZE, on_ranks, timeout=200)


@pytest.mark.parametrize("name", [*METHODS, "micro-batches"])
def test_steps_in_backward_are_those_of_one_process(ranks, name):
    wanted = trained(name, build()) if name in METHODS else accumulated(build())
    for found, _ in ranks:
        for key, want in wanted.items():
            torch.testing.assert_close(found[name][key], want, atol=2e-4, rtol=2e-3, msg=lambda m: f"{key}: {m}")


def test_limiters_send_one_message_a_step(ranks):
    """Of four matrices."""
    for _, sent in ranks:
        assert sent == dict.fromkeys(LIMITED, ["all_reduce"])
