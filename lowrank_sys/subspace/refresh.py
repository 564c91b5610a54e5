"""When a basis is chosen anew, how, and what becomes of the moments."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.subspace import refresh_lists
from lowrank_sys.reference.subspace import basis_from_sketch, svd_basis
from lowrank_sys.subspace import gap as adaptive
from lowrank_sys.subspace.basis import DENSE, Int4
from lowrank_sys.subspace.moments import reset, rotate

# A countdown of COLD says that there is no basis yet.
COLD = -1


def randomized_basis(grad, basis, *, rank, left, seed=0):
    """(the next basis of G (m, n), its energies) by subspace iteration: two products with G from the old one, one for a first.

    A first basis is refreshed within a gap, and the first step of a model needs one for every matrix at once.
    """
    n_iter = 0 if basis is None else 1
    return torch.ops.lowrank.subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, seed=seed)


def _svd(grad, basis, *, rank, left, seed):
    return svd_basis(grad, basis, rank=rank, left=left)


# Each returns (basis, energies); energies of 0 say that the gradient was zero or not finite, and that the basis is not of it.
SELECT = {"randomized": randomized_basis, "svd": _svd}


def refresh_(
    bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds, subspace, moments, **full
):
    """Advance the refresh schedule of many matrices by one step, choosing anew each basis that is due.

    A matrix whose gradient is zero or not finite keeps its basis, or gets a seeded one if it has none, and stays due.

    Args:
        bases: (m or n, r) each, written in place; packed codes, if there are scales.
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

    The full form also takes, each list empty where it does not apply:
        basis_scales, basis_offsets, group_size: of bases in INT4, see quantize_int4; the old one is decoded while it is needed.
        exp_avg_absmaxes, exp_avg_sq_absmaxes: of moments in 8 bits, see quantize_blockwise.
        gaps, overlaps: 0-dim int64 CPU tensors, each the gap of one matrix in place of `gap`, and the queues (fp32) of the
            overlaps that make it longer: lowrank_sys.subspace.gap, with cos_threshold, gamma_proj and max_gap.
    """
    stored, schedule = refresh_lists(bases, exp_avgs, exp_avg_sqs, steps, moments, **full)
    _ops.subspace.check_refresh(
        stored, grads, countdowns, lr, schedule, gap=gap, first_gaps=first_gaps, seeds=seeds, subspace=subspace
    )
    if not countdowns:
        return
    waits = torch.stack(countdowns).tolist()
    due = [i for i, wait in enumerate(waits) if wait <= 0]
    for i in due:
        _ops.subspace.check_refresh_matrix(stored, i, grads[i], left=left)
    training, matrices = trains(lr), _Matrices(stored, schedule, left)
    taken = []
    for i in due:
        old = None if waits[i] == COLD else matrices.load(i, grads[i].shape[0 if left else 1])
        new, energies = SELECT[subspace](grads[i], old, rank=matrices.rank(i), left=left, seed=seeds[i])
        taken.append(is_taken(energies))
        if taken[-1] or old is None:
            if old is not None and training:
                matrices.compare(i, old, new)
            matrices.replace(i, old, new)
    if training:
        matrices.grow_gaps()
        for i, done in zip(due, taken):
            countdowns[i].fill_((first_gaps[i] if waits[i] == COLD else matrices.gap(i, gap)) if done else waits[i] + 1)
        count_down_(countdowns)


def refresh_from_sketch_(
    bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds, moments, **full
):
    """refresh_ at the end of a step, from sketches of its gradient: what is due gets the basis of the next step.

    Args:
        sketches: Y = G Omega (m, l) if left, else (Gᵀ Omega)ᵀ (l, n), of the matrices that are due (countdown 0 or COLD);
            empty for the others, and for a matrix whose sketch is not there: it keeps its basis, and stays due.
        countdowns: as in refresh_; COLD - k waits k steps for the first refresh, so that not every matrix of a model needs
            its first sketch at once.

    The other arguments as in refresh_. Until the first refresh `bases` are seeded ones, so moments are transported then too.
    """
    stored, schedule = refresh_lists(bases, exp_avgs, exp_avg_sqs, steps, moments, **full)
    _ops.subspace.check_refresh_from_sketch(
        stored, sketches, countdowns, lr, schedule, left=left, gap=gap, first_gaps=first_gaps, seeds=seeds
    )
    if not countdowns or not trains(lr):
        return
    waits, matrices, taken = torch.stack(countdowns).tolist(), _Matrices(stored, schedule, left), set()
    for i, wait in enumerate(waits):
        if wait < COLD:
            countdowns[i].add_(2)  # with the common step below: one nearer to COLD
        elif is_due(wait) and sketches[i].numel() > 0:
            old = matrices.load(i, sketches[i].shape[0 if left else 1])
            new, energies = basis_from_sketch(sketches[i], old, left=left, seed=seeds[i])
            if is_taken(energies):
                taken.add(i)
                if wait != COLD:  # the first one follows a seeded basis
                    matrices.compare(i, old, new)
                matrices.replace(i, old, new)
    matrices.grow_gaps()
    for i, wait in enumerate(waits):
        if is_due(wait):
            countdowns[i].fill_((first_gaps[i] if wait == COLD else matrices.gap(i, gap)) if i in taken else wait + 1)
    count_down_(countdowns)


def is_due(wait):
    """Whether a step at this countdown ends with a refresh from its sketch."""
    return wait in (0, COLD)


def is_taken(energies):
    """Whether a choice with these energies (r,), or norms, is one: there was a gradient, and it was finite.

    What is not taken stays due. A GPU is not asked, which would make the host wait: there every choice counts as taken.
    """
    return energies.device.type != "cpu" or bool(((energies > 0) & (energies < float("inf"))).any())


def trains(lr):
    """False for a host-side rate of 0: nothing is trained, and what is due stays due."""
    return lr.device.type != "cpu" or lr.item() != 0


def count_down_(countdowns):
    """One step less for each. By tensors: with a number, torch takes twice as long."""
    torch._foreach_sub_(countdowns, [countdowns[0].new_ones(())] * len(countdowns))


class _Matrices:
    """What a refresh does to one matrix of its lists."""

    def __init__(self, stored, schedule, left):
        self._stored, self._schedule, self._left = stored, schedule, left
        self._store = Int4(stored.group_size) if stored.is_int4 else DENSE
        self._means = {}  # matrix -> mean overlap of its last bases, on the device

    def load(self, i, d):
        return self._store.load(*self._stored.basis(i), d=d)

    def rank(self, i):
        return self._store.rank(*self._stored.basis(i))

    def compare(self, i, old, new):
        """Remember how much of its subspace matrix i keeps, if its gap is its own."""
        if self._schedule.gaps:
            value = adaptive.overlap(old, new)
            self._means[i] = adaptive.push_(self._schedule.overlaps[i], value, _same(old, new))

    def replace(self, i, old, new):
        """Store the new basis and transport the moments: from and to what is stored, which is rounded."""
        store, tensors, moments = self._store, self._stored.basis(i), self._stored.moments
        if old is None:
            store.write(*tensors, new=new)
            return
        if moments == "rotate" and store is DENSE:
            old = old.clone()
        kept = _same(old, new)
        store.write(*tensors, new=new, kept=kept)
        if moments == "keep":
            return
        exp_avg, exp_avg_sq, step, absmaxes = self._stored.adam(i)
        if moments == "reset":
            reset(exp_avg, exp_avg_sq, *absmaxes, step)
        else:
            rotate(exp_avg, exp_avg_sq, absmaxes, old, store.load(*tensors, d=new.shape[0]), kept, left=self._left)

    def grow_gaps(self):
        gaps = [self._schedule.gaps[i] for i in self._means]
        adaptive.grow_(gaps, list(self._means.values()), self._schedule)

    def gap(self, i, common):
        return self._schedule.gaps[i].item() if self._schedule.gaps else common


def _same(old, new):
    """Whether the old basis was kept, 0-dim: nothing waits for the answer."""
    return (old == new).all()
