"""What crosses the wire in a step, counted where the process group takes it, against the shapes."""

import argparse

import pytest
import torch
import world
from counted import install
from projected_model import GAP, RANK, galore, llama, projected
from small import CLOSE, assert_same, bases, train, weights
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.distributed import LowRankState, low_rank_hook
from lowrank_sys.memory import devices
from lowrank_sys.memory.layout import layout
from lowrank_sys.optim import FiraAdamW, GaLoreAdamW8bit
from lowrank_sys.subspace.refresh import is_due

SIZE, STEPS = 2, 3 * GAP
COLUMNS = RANK + 8  # of a sketch


def plain_ddp(model, optimizer):
    return DistributedDataParallel(model)


def hooked(model, optimizer):
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(LowRankState(optimizer), low_rank_hook)
    return ddp


def power_sgd(model, optimizer):
    ddp = DistributedDataParallel(model)
    state = PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)
    return ddp


def at_step(**keys):
    model = llama()
    return model, galore(model, **keys)


RUNS = {
    "whole": (at_step, plain_ddp),
    "accumulate": (lambda: at_step(per_layer="accumulate"), plain_ddp),
    "projected": (projected, plain_ddp),
    "hook": (at_step, hooked),
    "hook, next": (lambda: at_step(refresh="next"), hooked),
    "powerSGD": (at_step, power_sgd),
}


def due(optimizer):
    """Names of the matrices whose basis the next step renews."""
    found = []
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"]):
            state = optimizer.state.get(param, {})
            if "countdown" in state:
                wait = int(state["countdown"])
                found += [name] if (is_due(wait) if group["refresh"] == "next" else wait <= 0) else []
    return found


def counted(rank, folder):
    """{name: (bytes of each step and which bases were due in it, losses, weights, bases)}."""
    group, found = install(rank, SIZE, folder), {}
    for name, (make, wrap) in RUNS.items():
        model, optimizer = make()
        ddp = wrap(model, optimizer)
        steps, losses = [], []
        for step in range(STEPS):
            group.sent.clear()
            renewed = due(optimizer)
            losses += train(ddp, optimizer, [step], rank=rank, size=SIZE)
            steps.append((sum(group.sent.values()), renewed))
        found[name] = steps, losses, weights(model), bases(optimizer)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return world.run(SIZE, counted, str(tmp_path_factory.mktemp("group")), timeout=240)


MATRICES = {name: p.shape for name, p in llama().named_parameters() if "proj" in name}
# What is no matrix of a group with a rank, and the buffers, which DistributedDataParallel broadcasts at every forward.
PLAIN = 4 * sum(p.numel() for name, p in llama().named_parameters() if name not in MATRICES)
BUFFERS = 4 * sum(b.numel() for b in llama().buffers())


def bytes_of(name, what, right=False):
    """Of G, R, the basis or a sketch; fp32."""
    m, n = MATRICES[name]
    d, other = (m, n) if m < n and not right else (n, m)
    return 4 * {"G": m * n, "R": RANK * other, "basis": d * RANK, "sketch": d * COLUMNS}[what]


# name -> bytes of the matrices in a step in which these bases are due
WANTED = {
    "whole": lambda due: sum(bytes_of(name, "G") for name in MATRICES),
    # one number for each matrix says whether a rank has its gradient, or its sketch
    "accumulate": lambda due: sum(bytes_of(name, "R") + 4 for name in MATRICES) + renewal(due),
    "projected": lambda due: sum(bytes_of(name, "R", True) for name in MATRICES) + renewal(due, True),
    "hook": lambda due: sum(bytes_of(name, "G" if name in due else "R") for name in MATRICES),
    "hook, next": lambda due: sum(bytes_of(name, "G" if name in due else "R") for name in MATRICES),
}


def renewal(due, right=False):
    return sum(bytes_of(name, "sketch", right) + 4 + bytes_of(name, "basis", right) for name in due)


def test_bytes_of_a_step(ranks):
    """R of all matrices, and a sketch and a basis of those that are due: to the byte, on all ranks, from the third step on, when
    DistributedDataParallel has put its buckets in order."""
    for one in ranks:
        for name, wanted in WANTED.items():
            steps = one[name][0][2:]
            assert [sent for sent, _ in steps] == [BUFFERS + PLAIN + wanted(due) for _, due in steps], name
            assert {len(due) for _, due in steps} - {0, len(MATRICES)}  # some are due, some are not


def test_the_plan_of_several_devices_is_what_is_counted(ranks):
    """Over a gap, in which each basis is due once."""
    model, optimizer = at_step(per_layer="accumulate")
    train(model, optimizer, 1)
    args = argparse.Namespace(nproc=SIZE, strategy="ddp", per_layer="accumulate", accumulate_dtype="fp32")
    planned = devices.wire(layout(model, optimizer), args)
    counted = [sent - BUFFERS - 4 * len(MATRICES) - 4 * len(due) for sent, due in ranks[0]["accumulate"][0][-GAP:]]
    assert sum(counted) == GAP * (planned["gradients"] + planned["low-rank gradients"] + planned["refreshes"])


def test_fewer_than_power_sgd(ranks):
    """Of the same rank, which sends both factors at every step, and of embeddings too; a renewal comes once a gap of 200."""
    params = list(llama().parameters())
    factors = 4 * sum(RANK * (p.shape[0] + p.shape[1]) if p.dim() == 2 else p.numel() for p in params)
    assert ranks[0]["powerSGD"][0][-1][0] == BUFFERS + factors
    of_matrices = sum(bytes_of(name, "R") + bytes_of(name, "basis") for name in MATRICES)
    for name in ("projected", "accumulate"):
        assert WANTED[name](()) + renewal(MATRICES) / 200 < 0.6 * of_matrices
    assert WANTED["hook"](()) + sum(bytes_of(name, "G") for name in MATRICES) / 200 < 0.6 * of_matrices


def test_the_hook_changes_no_number(ranks):
    """But for the rounding of back(R): the step finds R again."""
    for name, keys in {"hook": {}, "hook, next": {"refresh": "next"}}.items():
        model, optimizer = at_step(**keys)
        losses = torch.tensor(train(model, optimizer, STEPS))
        torch.testing.assert_close(torch.tensor([one[name][1] for one in ranks]).mean(0), losses, **CLOSE)
        assert_same(weights(model), ranks[0][name][2], **CLOSE)
        for one in ranks[1:]:
            assert_same(one[name][2], ranks[0][name][2])
            assert all(map(torch.equal, one[name][3], ranks[0][name][3]))


def test_whom_the_hook_refuses():
    for make, message in [
        (lambda model: galore(model, cls=FiraAdamW), "needs nothing of a gradient but R, got FiraAdamW"),
        (lambda model: galore(model, "accumulate"), "must have per_layer=None"),
        (lambda model: galore(model, quant=True, quant_group_size=32), "quant must be False, got True in group 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            LowRankState(make(llama()))
    LowRankState(galore(llama(), cls=GaLoreAdamW8bit))
