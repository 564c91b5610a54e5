"""When a basis is chosen anew, how, and what becomes of the moments."""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.subspace import svd_basis

# A countdown of COLD says that there is no basis yet.
COLD = -1


def randomized_basis(grad, basis, *, rank, left, seed=0):
    """The next basis of G (m, n) by subspace iteration: from the old one with two products with G, the first with one.

    A first basis is refreshed within a gap, and the first step of a model needs one for every matrix at once.
    """
    n_iter = 0 if basis is None else 1
    return torch.ops.lowrank.subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, seed=seed)[0]


def _svd(grad, basis, *, rank, left, seed):
    return svd_basis(grad, basis, rank=rank, left=left)


SELECT = {"randomized": randomized_basis, "svd": _svd}


def refresh_(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds, subspace, moments):
    """Advance the refresh schedule of many matrices by one step, choosing anew each basis that is due.

    Args:
        bases: (m or n, r) each, written in place.
        grads: (m, n) each.
        countdowns: 0-dim int64 CPU tensors: steps until the next refresh, COLD before the first. On the host, so that
            a GPU is never asked.
        exp_avgs, exp_avg_sqs, steps: the Adam state that `moments` acts on; empty lists where it is 'keep'.
        lr: 0-dim; with a host-side rate of 0 nothing can be trained, and a refresh stays due (checkpoint loaders take such
            a step to create the state).
        gap: steps between two refreshes.
        first_gaps: steps until the second basis of each matrix, which staggers the refreshes.
        seeds: one a matrix.
        subspace: 'randomized' | 'svd'.
        moments: 'keep' | 'reset' (the step counter too) | 'rotate'.
    """
    _ops.subspace.check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, gap=gap, first_gaps=first_gaps,
                                seeds=seeds, subspace=subspace, moments=moments)
    if not countdowns:
        return
    waits = torch.stack(countdowns).tolist()
    due = [i for i, wait in enumerate(waits) if wait <= 0]
    for i in due:
        matrix = _ops.subspace.refresh_matrix(i, bases, grads, exp_avgs, exp_avg_sqs, steps, moments)
        _ops.subspace.check_refresh_matrix(*matrix, left=left)
    for i in due:
        basis, cold = bases[i], waits[i] == COLD
        new = SELECT[subspace](grads[i], None if cold else basis, rank=basis.shape[1], left=left, seed=seeds[i])
        if not cold and moments == "reset":
            for tensor in (exp_avgs[i], exp_avg_sqs[i], steps[i]):
                tensor.zero_()
        elif not cold and moments == "rotate":
            # From and to what is stored, which is rounded to the basis' dtype.
            torch.ops.lowrank.rotate_moments_(exp_avgs[i], exp_avg_sqs[i], basis, new.to(basis.dtype), left=left)
        basis.copy_(new)
    if lr.device.type != "cpu" or lr.item() != 0:
        for i in due:
            countdowns[i].fill_(first_gaps[i] if waits[i] == COLD else gap)
        torch._foreach_sub_(countdowns, 1)
