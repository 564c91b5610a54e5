"""The refresh schedule of what is no matrix: the key of a Gaussian basis, and the rows of a structured sparse one."""

import torch

from lowrank_sys import _ops
from lowrank_sys.subspace.refresh import COLD, count_down_, is_taken, trains


def refresh_keys_(keys, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, gap, moments):
    """Advance the schedule of many Gaussian bases by one step: a key whose basis is due counts one refresh more.

    Args:
        keys: int64 (4,) each: seed, refresh, parameter and first row. Nothing is computed until a product asks for it.
        countdowns: 0-dim int64 CPU tensors: steps until the next refresh.
        exp_avgs, exp_avg_sqs, steps: the Adam state that `moments` acts on; empty lists where it is 'keep'.
        lr: 0-dim; with a host-side rate of 0 a refresh stays due.
        gap: steps between two refreshes.
        moments: 'keep' | 'reset' (the step counter too).
    """
    _ops.schedule.check_refresh_keys(keys, countdowns, exp_avgs, exp_avg_sqs, steps, lr, gap=gap, moments=moments)
    if not countdowns or not trains(lr):
        return
    for i, wait in enumerate(torch.stack(countdowns).tolist()):
        if wait <= 0:
            keys[i][1] += 1
            countdowns[i].fill_(gap)
            if moments == "reset":
                _reset(i, exp_avgs, exp_avg_sqs, steps)
    count_down_(countdowns)


def refresh_rows_(
    indices,
    row_scales,
    grads,
    countdowns,
    refreshes,
    exp_avgs,
    exp_avg_sqs,
    steps,
    lr,
    *,
    left,
    gap,
    first_gaps,
    seeds,
    parameters,
    method,
    moments,
):
    """Advance the schedule of many structured sparse bases by one step, selecting anew the rows that are due.

    Args:
        indices, row_scales: (r,) int32 and (r,) fp32 each, written in place as `select_rows` has them; no row_scales where
            method is 'top'.
        grads: (m, n) each; rows if left, else columns, are selected by their norms. One that is not finite comes last; a
            gradient without any that is finite and not zero is no choice, and the matrix stays due.
        countdowns, refreshes: 0-dim int64 CPU tensors: steps until the next selection, COLD before the first; and the
            selections so far, each with bits of its own.
        exp_avgs, exp_avg_sqs, steps, lr, gap, first_gaps, seeds: as in refresh_.
        parameters: of the random bits.
        method: 'top' | 'sample' | 'sample_replace', see `select_rows`.
        moments: 'keep' | 'reset' (the step counter too).
    """
    _ops.schedule.check_refresh_rows(
        indices,
        row_scales,
        grads,
        countdowns,
        refreshes,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        gap=gap,
        first_gaps=first_gaps,
        seeds=seeds,
        parameters=parameters,
        method=method,
        moments=moments,
    )
    if not countdowns:
        return
    waits = torch.stack(countdowns).tolist()
    due = [i for i, wait in enumerate(waits) if wait <= 0]
    for i in due:
        matrix = _ops.schedule.refresh_rows_matrix(i, indices, row_scales, grads, exp_avgs, exp_avg_sqs, steps, moments)
        _ops.schedule.check_refresh_rows_matrix(*matrix, left=left)
    taken = []
    for i in due:
        norms = torch.ops.lowrank.row_norms(grads[i], left=left)
        taken.append(is_taken(norms))
        if not taken[-1] and waits[i] != COLD:
            continue
        chosen, scale = torch.ops.lowrank.select_rows(
            norms, r=indices[i].shape[0], method=method, seed=seeds[i], step=refreshes[i].item(), parameter=parameters[i]
        )
        indices[i].copy_(chosen)
        if row_scales:
            row_scales[i].copy_(scale)
        if moments == "reset" and waits[i] != COLD:
            _reset(i, exp_avgs, exp_avg_sqs, steps)
    if trains(lr):
        for i, done in zip(due, taken):
            countdowns[i].fill_((first_gaps[i] if waits[i] == COLD else gap) if done else waits[i] + 1)
            refreshes[i] += done
        count_down_(countdowns)


def _reset(i, exp_avgs, exp_avg_sqs, steps):
    for tensor in (exp_avgs[i], exp_avg_sqs[i], steps[i]):
        tensor.zero_()
