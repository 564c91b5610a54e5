"""The refresh schedules of keys and of rows: plain Python says what is due, the selection what it becomes."""

import torch

from cases.case import same_bits
from cases.draw import FLOATS
from cases.projection import low_rank
from cases.subspace import NOT_DUE, after_step, refreshes, taken
from lowrank_sys import _ops
from lowrank_sys.reference import selection
from lowrank_sys.subspace.refresh import COLD

STATE = ("exp_avgs", "exp_avg_sqs", "steps")


def state(draw, shapes):
    return dict(
        exp_avgs=[draw.values(*shape, hostile=False) for shape in shapes],
        exp_avg_sqs=[draw.values(*shape, hostile=False).abs() for shape in shapes],
        steps=[torch.tensor(5.0) for _ in shapes],
        lr=torch.tensor(draw.of(0.1, 0.0)),
        gap=draw.of(1, 7),
        moments=draw.of("keep", "reset"),
    )


def keys_arguments(draw):
    count = draw.count()
    keys = [torch.tensor([draw.of(0, -7, 2**62), draw.of(0, 5), i, draw.of(0, 64)]) for i in range(count)]
    countdowns = [torch.tensor(draw.of(0, 3, -1)) for _ in range(count)]
    return dict(keys=keys, countdowns=countdowns, **state(draw, [(draw.size(0, 9), draw.size(0, 9)) for _ in range(count)]))


def assert_state(before, after, i, fresh):
    for name in STATE:
        then, now = before[name][i], after[name][i]
        assert not now.any() if fresh and before["moments"] == "reset" else same_bits(then, now), name


def compare_keys(before, after, result):
    trains = before["lr"] != 0
    for i, (key, countdown) in enumerate(zip(before["keys"], before["countdowns"])):
        due = bool(trains and countdown <= 0)
        want = key.clone()
        want[1] += due
        assert same_bits(after["keys"][i], want)
        assert after["countdowns"][i] == ((before["gap"] if due else countdown) - 1 if trains else countdown)
        assert_state(before, after, i, due)


def rows_arguments(draw):
    left, count = draw.of(True, False), draw.count()
    method = draw.of(*_ops.sparse.METHODS)
    grads, indices, shapes = [], [], []
    for _ in range(count):
        m, n = draw.size(1, 65), draw.size(1, 65)
        rank = draw.of(*{min(r, m if left else n): None for r in (1, 3, 65)})
        grads.append(draw.values(m, n, dtype=draw.of(*FLOATS)))
        indices.append(torch.arange(rank, dtype=torch.int32))
        shapes.append(low_rank(m, n, rank, left))
    scales = [] if method == "top" else [torch.ones(len(index)) for index in indices]
    return dict(
        indices=indices,
        row_scales=scales,
        grads=grads,
        left=left,
        method=method,
        countdowns=[torch.tensor(draw.of(0, COLD, 3)) for _ in grads],
        refreshes=[torch.tensor(draw.of(0, 4)) for _ in grads],
        first_gaps=[draw.of(1, 4) for _ in grads],
        seeds=[draw.of(0, 9) for _ in grads],
        parameters=[draw.of(0, 2) for _ in grads],
        **state(draw, shapes),
    )


def compare_rows(before, after, result):
    trains = before["lr"] != 0
    for i, countdown in enumerate(before["countdowns"]):
        due, cold = countdown <= 0, countdown == COLD
        index, scale = before["indices"][i], before["row_scales"][i] if before["row_scales"] else None
        done = True
        if due:
            norms = torch.ops.lowrank.row_norms(before["grads"][i], left=before["left"])
            done = taken(norms)
        if due and (done or cold):
            index, rho = selection.select_rows(
                norms,
                r=len(index),
                method=before["method"],
                seed=before["seeds"][i],
                step=int(before["refreshes"][i]),
                parameter=before["parameters"][i],
            )
            scale = scale if scale is None else rho
        assert same_bits(after["indices"][i], index)
        if scale is not None:
            torch.testing.assert_close(after["row_scales"][i], scale, rtol=3e-7, atol=0)
        assert_state(before, after, i, due and done and not cold)
        assert after["refreshes"][i] == before["refreshes"][i] + int(trains and due and done)
        wait = int(countdown)
        if trains:
            wait = after_step(wait, before["first_gaps"][i] if cold else before["gap"], due, done)
        assert after["countdowns"][i] == wait


CASES = {
    "refresh_ keys": refreshes("Gaussian", keys_arguments, compare_keys, NOT_DUE),
    "refresh_ rows": refreshes("Rows", rows_arguments, compare_rows, NOT_DUE),
}
