"""Choosing and refreshing a basis."""

import torch

from lowrank_sys.reference import transport
from lowrank_sys.reference.subspace import leading_directions, svd_basis
from lowrank_sys.subspace.refresh import COLD, randomized_basis

from fuzz.harness import FLOATS, Fuzz, same_bits
from fuzz.projection import low_rank

ORTHONORMAL = 1e-5  # shifted CholeskyQR reaches a few epsilons times sqrt(r)
# Squares of G's entries and their sums stay in fp32's range within these.
LEAST, MOST = 1e-12, 1e15


def orthonormal(draw, d, r):
    return torch.linalg.qr(draw.values(d, r, hostile=False))[0].contiguous()


def iteration_arguments(draw):
    m, n, left = draw.size(1), draw.size(1), draw.of(True, False)
    rank = draw.of(1, min(m, n), (min(m, n) + 1) // 2)
    warm = draw.of(False, True)
    basis = orthonormal(draw, m if left else n, rank) if warm else None
    return dict(grad=draw.values(m, n, dtype=draw.of(*FLOATS)), basis=basis, rank=rank, left=left,
                n_iter=draw.of(2, 1, 3) if warm else draw.of(2, 0, 1), oversample=draw.of(None, 0, 1, 400),
                seed=draw.of(0, 12345))


def assert_orthonormal(basis):
    error = (basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max()
    assert error < ORTHONORMAL, f"off orthonormal by {error}"


def compare_iteration(before, after, result):
    grad, old, left = before["grad"].double(), before["basis"], before["left"]
    basis, energies = result
    assert basis.shape == (grad.shape[0 if left else 1], before["rank"]) and energies.shape == (before["rank"],)
    assert_orthonormal(basis)
    assert (energies >= 0).all() and (energies[:-1] >= energies[1:]).all()
    if not grad.isfinite().all() or not grad.any():
        assert not energies.any()
        assert old is None or same_bits(basis, old)
    elif LEAST < grad.abs().max() < MOST and before["n_iter"] >= 2:
        energy = (basis.double().T @ grad if left else grad @ basis.double()).square().sum()
        best = torch.linalg.svdvals(grad)[:before["rank"]].square().sum()
        # On a flat spectrum two passes tell little apart, but what they find is above the average.
        assert energy >= 0.5 * best


def refresh_arguments(draw):
    left, count = draw.of(True, False), draw.of(1, 2, 0)
    grads, bases, exp_avgs, exp_avg_sqs = [], [], [], []
    for _ in range(count):
        m, n = draw.size(1, 65), draw.size(1, 65)
        rank = draw.of(1, min(m, n))
        shape = low_rank(m, n, rank, left)
        grads.append(draw.values(m, n, dtype=draw.of(*FLOATS)))
        bases.append(orthonormal(draw, m if left else n, rank).to(draw.of(*FLOATS)))
        exp_avgs.append(draw.values(*shape, hostile=False))
        exp_avg_sqs.append(draw.values(*shape, hostile=False).abs())
    countdowns = [torch.tensor(draw.of(0, COLD, 3)) for _ in range(count)]
    return dict(bases=bases, grads=grads, countdowns=countdowns, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs,
                steps=[torch.tensor(5.0) for _ in range(count)], lr=torch.tensor(draw.of(0.1, 0.0)),
                left=left, gap=draw.of(1, 7), first_gaps=[draw.of(1, 4) for _ in range(count)],
                seeds=[draw.of(0, 9) for _ in range(count)], subspace=draw.of("randomized", "svd"),
                moments=draw.of("keep", "reset", "rotate"))


def compare_refresh(before, after, result):
    """The schedule in plain Python; a due basis is what the selection gives, and the moments follow `moments`."""
    left, moments = before["left"], before["moments"]
    for i, countdown in enumerate(before["countdowns"].copy()):
        then, now = ({name: values[name][i] for name in ("bases", "grads", "exp_avgs", "exp_avg_sqs", "steps")}
                     for values in (before, after))
        cold, due = countdown == COLD, countdown <= 0
        basis = then["bases"]
        if due:
            select = svd_basis if before["subspace"] == "svd" else randomized_basis
            seed = {} if before["subspace"] == "svd" else {"seed": before["seeds"][i]}
            new = select(then["grads"], None if cold else basis, rank=basis.shape[1], left=left, **seed)
            assert same_bits(now["bases"], new.to(basis.dtype))
        else:
            assert same_bits(now["bases"], basis)
        stays = not due or cold or moments == "keep"
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            assert not stays or same_bits(then[name], now[name]), name
            assert moments != "reset" or stays or not now[name].any(), name
        if moments == "rotate" and not stays:
            want = then["exp_avgs"].clone(), then["exp_avg_sqs"].clone()
            transport.rotate(*want, basis, new.to(basis.dtype), left=left)
            assert same_bits(now["exp_avgs"], want[0]) and same_bits(now["exp_avg_sqs"], want[1])
            assert (now["exp_avg_sqs"] >= 0).all() and same_bits(now["steps"], then["steps"])
        wait = countdown.item()
        if before["lr"] != 0:
            wait = ((before["first_gaps"][i] if cold else before["gap"]) if due else wait) - 1
        assert after["countdowns"][i] == wait


def directions_arguments(draw):
    d, other, left = draw.size(1), draw.size(1), draw.of(True, False)
    rank = draw.of(1, min(d, other), (min(d, other) + 1) // 2)
    shape = (rank, other) if left else (other, rank)
    exp_avg = draw.values(*shape, dtype=draw.of(*FLOATS), hostile=draw.of(False, True)) if draw.of(True, False) else None
    return dict(basis=orthonormal(draw, d, rank).to(draw.of(*FLOATS)), exp_avg=exp_avg, other=other, left=left,
                seed=draw.of(0, 12345))


def compare_directions(before, after, result):
    """Orthonormal but for rounding, that of 16-bit storage included: 2^-8 of a column's square, and noise in the others."""
    basis, exp_avg = before["basis"], before["exp_avg"]
    d, rank = basis.shape
    columns = min(rank + max(8, -(-rank // 8)), d, before["other"])
    assert result.dtype == basis.dtype and result.shape == (before["other"], columns)
    if exp_avg is None or exp_avg.isfinite().all():
        gram = result.double().T @ result.double()
        error = (gram - torch.eye(result.shape[1])).abs().max()
        assert error < (1e-4 if basis.dtype == torch.float32 else 2e-2)


def sketch_arguments(draw):
    """As refresh_'s, with sketches in place of the gradients; countdowns may wait for their first refresh."""
    arguments = refresh_arguments(draw)
    left = arguments["left"]
    for key in ("grads", "subspace"):
        del arguments[key]
    arguments["countdowns"] = [torch.tensor(draw.of(0, COLD, 3, COLD - 2)) for _ in arguments["bases"]]
    sketches = []
    for basis in arguments["bases"]:
        d, rank = basis.shape
        columns = rank + draw.of(0, 1, 8)
        there = draw.of(True, False)
        sketches.append(draw.values(*((d, columns) if left else (columns, d))) if there else torch.empty(0))
    return arguments | {"sketches": sketches}


def compare_sketch(before, after, result):
    left, moments = before["left"], before["moments"]
    for i, countdown in enumerate(before["countdowns"].copy()):
        then, now = ({name: values[name][i] for name in ("bases", "sketches", "exp_avgs", "exp_avg_sqs", "steps")}
                     for values in (before, after))
        wait, basis, sketch = countdown.item(), then["bases"], then["sketches"]
        trains = before["lr"] != 0
        due = trains and wait in (0, COLD)
        new = basis
        if due and sketch.numel():
            y = sketch if left else sketch.T.contiguous()
            new = leading_directions(y, basis.float(), rank=basis.shape[1], seed=before["seeds"][i])[0].to(basis.dtype)
        assert same_bits(now["bases"], new)
        stays = not due or not sketch.numel() or moments == "keep"
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            assert not stays or same_bits(then[name], now[name]), name
            assert moments != "reset" or stays or not now[name].any(), name
        if moments == "rotate" and not stays:
            want = then["exp_avgs"].clone(), then["exp_avg_sqs"].clone()
            transport.rotate(*want, basis, new, left=left)
            assert same_bits(now["exp_avgs"], want[0]) and same_bits(now["exp_avg_sqs"], want[1])
        if due:
            wait = (before["first_gaps"][i] if wait == COLD else before["gap"]) - 1
        elif trains:
            wait += 1 if wait < COLD else -1
        assert after["countdowns"][i] == wait


FUZZ = {
    "sketch_directions": Fuzz(directions_arguments, compare_directions),
    "refresh_from_sketch_": Fuzz(sketch_arguments, compare_sketch),
    "subspace_iteration": Fuzz(iteration_arguments, compare_iteration),
    "refresh_": Fuzz(refresh_arguments, compare_refresh, lenient="a matrix whose refresh is not due is not looked at"),
}
