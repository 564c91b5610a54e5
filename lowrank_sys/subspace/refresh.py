"""When a basis is chosen anew, how, and what becomes of the moments."""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.subspace import basis_from_sketch, svd_basis

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
        if not cold:
            _transport(i, basis, new.to(basis.dtype), exp_avgs, exp_avg_sqs, steps, left, moments)
        basis.copy_(new)
    if trains(lr):
        for i in due:
            countdowns[i].fill_(first_gaps[i] if waits[i] == COLD else gap)
        torch._foreach_sub_(countdowns, 1)


def refresh_from_sketch_(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds,
                         moments):
    """refresh_ at the end of a step, from sketches of its gradient: what is due gets the basis of the next step.

    Args:
        sketches: Y = G Omega (m, l) if left, else (Gᵀ Omega)ᵀ (l, n), of the matrices that are due (countdown 0 or COLD);
            empty for the others, and for a matrix whose sketch is not there: it keeps its basis.
        countdowns: as in refresh_; COLD - k waits k steps for the first refresh, so that not every matrix of a model needs
            its first sketch at once.

    The other arguments as in refresh_. Until the first refresh `bases` are seeded ones, so moments are transported then too.
    """
    _ops.subspace.check_refresh_from_sketch(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, left=left,
                                            gap=gap, first_gaps=first_gaps, seeds=seeds, moments=moments)
    if not countdowns or not trains(lr):
        return
    for i, wait in enumerate(torch.stack(countdowns).tolist()):
        if wait < COLD:
            countdowns[i].add_(2)  # with the common step below: one nearer to COLD
        elif is_due(wait):
            if sketches[i].numel() > 0:
                new = basis_from_sketch(sketches[i], bases[i], left=left, seed=seeds[i]).to(bases[i].dtype)
                _transport(i, bases[i], new, exp_avgs, exp_avg_sqs, steps, left, moments)
                bases[i].copy_(new)
            countdowns[i].fill_(first_gaps[i] if wait == COLD else gap)
    torch._foreach_sub_(countdowns, 1)


def is_due(wait):
    """Whether a step at this countdown ends with a refresh from its sketch."""
    return wait in (0, COLD)


def trains(lr):
    """False for a host-side rate of 0: nothing is trained, and what is due stays due."""
    return lr.device.type != "cpu" or lr.item() != 0


def _transport(i, old, new, exp_avgs, exp_avg_sqs, steps, left, moments):
    """From and to what is stored, which is rounded to the basis' dtype."""
    if moments == "reset":
        for tensor in (exp_avgs[i], exp_avg_sqs[i], steps[i]):
            tensor.zero_()
    elif moments == "rotate":
        torch.ops.lowrank.rotate_moments_(exp_avgs[i], exp_avg_sqs[i], old, new, left=left)
