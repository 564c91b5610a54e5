"""Steps of several matrices that go together where each of them sums over rows that are on other processes."""

import contextlib

import torch

# Numbers of low-rank gradients, of all rows, that wait for one message: 256 MiB in fp32, of which a process has its share.
WAITING = 1 << 26


def take_together(steps):
    """Take steps, generators. One that needs a sum yields (its lowrank_sys.subspace.shards.Shard, a vector, how many numbers wait
    with it) once, and is sent the sum over the group: one message for all of a group that wait."""
    waiting, count = [], 0
    for step in steps:
        asked = next(step, None)
        if asked is not None:
            waiting.append((step, *asked[:2]))
            count += asked[2]
        if count > WAITING:
            _answer(waiting)
            waiting, count = [], 0
    _answer(waiting)


def _answer(waiting):
    groups = {}
    for step, shard, sums in waiting:
        groups.setdefault(shard.group, []).append((step, shard, sums))
    for alike in groups.values():
        total = alike[0][1].sum(torch.cat([sums for _, _, sums in alike]))
        for (step, _, _), own in zip(alike, total.split([len(sums) for _, _, sums in alike])):
            with contextlib.suppress(StopIteration):
                step.send(own)
