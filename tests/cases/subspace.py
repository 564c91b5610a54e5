"""Choosing and refreshing a basis."""

import torch

from cases.case import Case, same_bits
from cases.draw import FLOATS
from cases.projection import low_rank
from lowrank_sys.reference import dequantize_blockwise, dequantize_int4, quantize_blockwise, quantize_int4
from lowrank_sys.subspace import transport
from lowrank_sys.subspace.iteration import leading_directions, svd_basis
from lowrank_sys.subspace.refresh import COLD
from lowrank_sys.subspace.select import randomized_basis

ORTHONORMAL = 1e-5  # shifted CholeskyQR reaches a few epsilons times sqrt(r)
# Squares of G's entries and their sums stay in fp32's range within these.
LEAST, MOST = 1e-12, 1e15
NAN = float("nan")


def orthonormal(draw, d, r):
    return torch.linalg.qr(draw.values(d, r, hostile=False))[0].contiguous()


def rotate(exp_avg, exp_avg_sq, old, new, *, left):
    c = transport.rotation(old, new, torch.float32)
    exp_avg.copy_(transport.rotated(exp_avg, c, left=left))
    exp_avg_sq.copy_(transport.rotated(exp_avg_sq, c * c, left=left))


# Names in a state, and of the lists of many matrices' here.
TENSORS = {
    "basis": "bases", "basis_scale": "basis_scales", "basis_offset": "basis_offsets", "key": "keys", "indices": "indices",
    "row_scale": "row_scales", "countdown": "countdowns", "refreshes": "refreshes", "gap": "gaps", "overlaps": "overlaps",
    "exp_avg": "exp_avgs", "exp_avg_absmax": "exp_avg_absmaxes", "exp_avg_sq": "exp_avg_sqs",
    "exp_avg_sq_absmax": "exp_avg_sq_absmaxes", "step": "steps",
}  # fmt: skip
NUMBERS = {"first_gap": "first_gaps", "seed": "seeds", "parameter": "parameters"}
HYPER = {"update_proj_gap": "gap", "cos_threshold": "cos_threshold", "gamma_proj": "gamma_proj", "max_update_proj_gap": "max_gap"}


def packed(kind, lists):
    """A function of a Draw: the arguments of refresh_ from lists by matrix and settings, as `lists` draws them."""

    def arguments(draw):
        drawn = lists(draw)
        count = len(drawn["countdowns"])
        own = {key: drawn[name] for key, name in TENSORS.items() if drawn.get(name)}
        numbers = {key: drawn[name] for key, name in NUMBERS.items() if name in drawn}
        if "basis_scale" in own:
            numbers["group_size"] = [drawn["group_size"]] * count
        hyper = {key: drawn[name] for key, name in HYPER.items() if name in drawn}
        sketched = "sketches" in drawn
        keys = list(own) or ["countdown"]
        return dict(
            tensors=[own[key][i] for i in range(count) for key in keys],
            gradients=drawn["sketches" if sketched else "grads"] if kind != "Gaussian" else drawn["exp_avgs"],
            numbers=[values[i] for i in range(count) for values in numbers.values()],
            lr=drawn["lr"], kind=kind, select=drawn.get("method", drawn.get("subspace", "randomized")),
            transport=drawn["moments"], keys=keys, number_keys=list(numbers), moments=["exp_avg", "exp_avg_sq"],
            signed=[True, False], hyper_keys=list(hyper), hyper=[float(value) for value in hyper.values()],
            left=drawn.get("left", True), sketched=sketched,
        )  # fmt: skip

    return arguments


def unpacked(arguments):
    """The lists and settings again, one list or setting each."""
    keys, numbers = arguments["keys"], arguments["number_keys"]
    lists = {name: [] for name in TENSORS.values()}
    lists |= {TENSORS[key]: arguments["tensors"][i :: len(keys)] for i, key in enumerate(keys)}
    values = {key: arguments["numbers"][i :: len(numbers)] for i, key in enumerate(numbers)}
    lists |= {NUMBERS[key]: value for key, value in values.items() if key in NUMBERS}
    lists |= {"group_size": values["group_size"][0] if "group_size" in values else None} if lists["bases"] else {}
    hyper = dict(zip(arguments["hyper_keys"], arguments["hyper"]))
    lists |= {name: hyper[key] for key, name in HYPER.items() if key in hyper}
    matrices = {"sketches" if arguments["sketched"] else "grads": arguments["gradients"]}
    return lists | matrices | {
        "lr": arguments["lr"], "left": arguments["left"], "moments": arguments["transport"], "subspace": arguments["select"],
        "method": arguments["select"],
    }  # fmt: skip


NOT_DUE = "a matrix whose refresh is not due is not looked at"


def refreshes(kind, lists, compare, lenient=""):
    return Case(
        packed(kind, lists), lambda before, after, result: compare(unpacked(before), unpacked(after), result), lenient=lenient
    )


def iteration_arguments(draw):
    m, n, left = draw.size(1), draw.size(1), draw.of(True, False)
    rank = draw.of(1, min(m, n), (min(m, n) + 1) // 2)
    warm = draw.of(False, True)
    basis = orthonormal(draw, m if left else n, rank) if warm else None
    return dict(
        grad=draw.values(m, n, dtype=draw.of(*FLOATS)),
        basis=basis,
        rank=rank,
        left=left,
        n_iter=draw.of(2, 1, 3) if warm else draw.of(2, 0, 1),
        oversample=draw.of(None, 0, 1, 400),
        seed=draw.of(0, 12345),
    )


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
        best = torch.linalg.svdvals(grad)[: before["rank"]].square().sum()
        # On a flat spectrum two passes tell little apart, but what they find is above the average.
        assert energy >= 0.5 * best


def refresh_arguments(draw):
    left, count = draw.of(True, False), draw.count()
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
    return dict(
        bases=bases,
        grads=grads,
        countdowns=countdowns,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=[torch.tensor(5.0) for _ in range(count)],
        lr=torch.tensor(draw.of(0.1, 0.0)),
        left=left,
        gap=draw.of(1, 7),
        first_gaps=[draw.of(1, 4) for _ in range(count)],
        seeds=[draw.of(0, 9) for _ in range(count)],
        subspace=draw.of("randomized", "svd"),
        moments=draw.of("keep", "reset", "rotate"),
    )


def compare_refresh(before, after, result):
    """The schedule in plain Python; a due basis is what the selection gives, and the moments follow `moments`."""
    left, moments = before["left"], before["moments"]
    for i, countdown in enumerate(before["countdowns"].copy()):
        then, now = (
            {name: values[name][i] for name in ("bases", "grads", "exp_avgs", "exp_avg_sqs", "steps")} for values in (before, after)
        )
        cold, due = countdown == COLD, countdown <= 0
        basis, done = then["bases"], True
        if due:
            select = svd_basis if before["subspace"] == "svd" else randomized_basis
            seed = {} if before["subspace"] == "svd" else {"seed": before["seeds"][i]}
            new, energies = select(then["grads"], None if cold else basis, rank=basis.shape[1], left=left, **seed)
            done = taken(energies)
            new = new if done or cold else basis
            assert same_bits(now["bases"], new.to(basis.dtype))
        else:
            assert same_bits(now["bases"], basis)
        stays = not due or cold or not done or moments == "keep"
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            assert not stays or same_bits(then[name], now[name]), name
            assert moments != "reset" or stays or not now[name].any(), name
        if moments == "rotate" and not stays:
            want = then["exp_avgs"].clone(), then["exp_avg_sqs"].clone()
            rotate(*want, basis, new.to(basis.dtype), left=left)
            assert same_bits(now["exp_avgs"], want[0]) and same_bits(now["exp_avg_sqs"], want[1])
            assert (now["exp_avg_sqs"] >= 0).all() and same_bits(now["steps"], then["steps"])
        wait = countdown.item()
        if before["lr"] != 0:
            wait = after_step(wait, before["first_gaps"][i] if cold else before["gap"], due, done)
        assert after["countdowns"][i] == wait


def after_step(wait, gap, due, done):
    """A countdown after a step: what is due and was not taken stays due."""
    return wait - 1 if not due else gap - 1 if done else wait


def taken(energies):
    """Whether a choice is one of a gradient: it was finite, and not zero."""
    return any(0 < value < float("inf") for value in energies.tolist())


def directions_arguments(draw):
    d, other, left = draw.size(1), draw.size(1), draw.of(True, False)
    rank = draw.of(1, min(d, other), (min(d, other) + 1) // 2)
    shape = (rank, other) if left else (other, rank)
    exp_avg = draw.values(*shape, dtype=draw.of(*FLOATS), hostile=draw.of(False, True)) if draw.of(True, False) else None
    return dict(
        basis=orthonormal(draw, d, rank).to(draw.of(*FLOATS)), exp_avg=exp_avg, other=other, left=left, seed=draw.of(0, 12345)
    )


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
        then, now = (
            {name: values[name][i] for name in ("bases", "sketches", "exp_avgs", "exp_avg_sqs", "steps")}
            for values in (before, after)
        )
        wait, basis, sketch = countdown.item(), then["bases"], then["sketches"]
        trains = before["lr"] != 0
        due = trains and wait in (0, COLD)
        new, done = basis, False
        if due and sketch.numel():
            y = sketch if left else sketch.T.contiguous()
            chosen, energies = leading_directions(y, basis.float(), rank=basis.shape[1], seed=before["seeds"][i])
            done = taken(energies)
            new = chosen.to(basis.dtype) if done else basis
        assert same_bits(now["bases"], new)
        stays = not done or moments == "keep"
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            assert not stays or same_bits(then[name], now[name]), name
            assert moments != "reset" or stays or not now[name].any(), name
        if moments == "rotate" and not stays:
            want = then["exp_avgs"].clone(), then["exp_avg_sqs"].clone()
            rotate(*want, basis, new, left=left)
            assert same_bits(now["exp_avgs"], want[0]) and same_bits(now["exp_avg_sqs"], want[1])
        if due:
            wait = after_step(wait, before["first_gaps"][i] if wait == COLD else before["gap"], due, done)
        elif trains:
            wait += 1 if wait < COLD else -1
        assert after["countdowns"][i] == wait


def full(plain):
    """The arguments of a full form from those of a plain one: INT4 or dense, coded moments or not, gaps of their own or not."""

    def arguments(draw):
        drawn = plain(draw)
        bases, size = drawn["bases"], draw.of(256, 32, 1024)
        lists = {
            name: [] for name in ("basis_scales", "basis_offsets", "exp_avg_absmaxes", "exp_avg_sq_absmaxes", "gaps", "overlaps")
        }
        if draw.of(True, False):
            packed = [quantize_int4(basis, group_size=size) for basis in bases]
            drawn["bases"], lists["basis_scales"], lists["basis_offsets"] = ([p[i] for p in packed] for i in range(3))
        if draw.of(True, False):
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                coded = [quantize_blockwise(moment, signed=signed, by_row=True) for moment in drawn[f"{name}s"]]
                drawn[f"{name}s"], lists[f"{name}_absmaxes"] = [c[0] for c in coded], [c[1] for c in coded]
        if draw.of(True, False):
            lists["gaps"] = [torch.tensor(draw.of(drawn["gap"], 5)) for _ in bases]
            queues = draw.of([NAN, NAN], [NAN, 0.9], [0.1, 0.2], [1.0, 1.0])
            lists["overlaps"] = [torch.tensor(queues) for _ in bases]
        return (
            drawn
            | lists
            | dict(group_size=size, cos_threshold=draw.of(0.4, 0.0, 1.0), gamma_proj=draw.of(2.0, 1.5), max_gap=draw.of(9, 100))
        )

    return arguments


def decoded(values, before):
    """The arguments of the plain form that these stand for: dense bases and fp32 moments."""
    values, left = dict(values), before["left"]
    if before["basis_scales"]:
        sizes = before.get("grads") or before["sketches"]
        values["bases"] = [
            dequantize_int4(
                *parts,
                d=2 * parts[0].shape[1] if like.numel() == 0 else like.shape[0 if left else 1],
                group_size=before["group_size"],
            )
            for like, *parts in zip(sizes, values["bases"], values["basis_scales"], values["basis_offsets"])
        ]
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if before[f"{name}_absmaxes"]:
            values[f"{name}s"] = [
                dequantize_blockwise(*coded, signed=signed) for coded in zip(values[f"{name}s"], values[f"{name}_absmaxes"])
            ]
    return values


def chosen_basis(then, i, before, wait):
    """(the fp32 basis that matrix i is to get, or None; whether it is one of a gradient)."""
    basis, left, seed = then["bases"][i], before["left"], before["seeds"][i]
    if "sketches" not in before:
        if wait > 0:
            return None, False
        select = svd_basis if before["subspace"] == "svd" else randomized_basis
        seed = {} if before["subspace"] == "svd" else {"seed": seed}
        new, energies = select(before["grads"][i], None if wait == COLD else basis, rank=basis.shape[1], left=left, **seed)
        return (new, taken(energies)) if taken(energies) or wait == COLD else (None, False)
    sketch = before["sketches"][i]
    if before["lr"] == 0 or wait not in (0, COLD) or not sketch.numel():
        return None, False
    new, energies = leading_directions(sketch if left else sketch.T.contiguous(), basis.float(), rank=basis.shape[1], seed=seed)
    return (new, True) if taken(energies) else (None, False)


def compare_full(before, after, result):
    """As the plain forms on what is decoded, within what storing rounds; gaps and queues by the rule in plain Python."""
    then, now, sketched = decoded(before, before), decoded(after, before), "sketches" in before
    trains = before["lr"].item() != 0
    for i, countdown in enumerate(before["countdowns"]):
        wait, first = countdown.item(), countdown.item() == COLD
        old, (new, done) = then["bases"][i], chosen_basis(then, i, before, wait)
        got = now["bases"][i]
        if new is None or torch.equal(new, old.float()):
            assert same_bits(got, old)
        elif before["basis_scales"]:
            want = quantize_int4(new, group_size=before["group_size"])
            for name, value in zip(("bases", "basis_scales", "basis_offsets"), want):
                assert same_bits(after[name][i], value)
        else:
            assert same_bits(got, new.to(old.dtype))
        carried = new is not None and before["moments"] != "keep" and (sketched or not first)
        for name, _ in (("exp_avgs", "exp_avg_absmaxes"), ("exp_avg_sqs", "exp_avg_sq_absmaxes")):
            assert carried or same_bits(before[name][i], after[name][i]), name
            assert before["moments"] != "reset" or not carried or not now[name][i].any(), name
        if carried and before["moments"] == "rotate":
            want = [then[name][i].clone() for name in ("exp_avgs", "exp_avg_sqs")]
            rotate(*want, old, got, left=before["left"])
            for name, absmax, value, signed in zip(
                ("exp_avgs", "exp_avg_sqs"), ("exp_avg_absmaxes", "exp_avg_sq_absmaxes"), want, (True, False)
            ):
                if before[absmax] and torch.equal(new, old.float()):  # a basis that was kept leaves codes to the byte
                    assert same_bits(after[name][i], before[name][i])
                elif before[absmax]:
                    codes, most = quantize_blockwise(value, signed=signed, by_row=True)
                    if before["basis_scales"]:  # decoded in another layout, of which a product may round its sums otherwise
                        torch.testing.assert_close(after[absmax][i], most, rtol=2.0**-20, atol=0)
                        assert ((after[name][i].int() - codes.int()).abs() <= 1).all(), name
                    else:
                        assert same_bits(after[name][i], codes) and same_bits(after[absmax][i], most)
                else:
                    assert same_bits(after[name][i], value)
        check_schedule(before, after, i, wait, old, new, done, trains)


def check_schedule(before, after, i, wait, old, new, done, trains):
    gap = before["gap"]
    if before["gaps"]:
        gap, queue = before["gaps"][i].item(), before["overlaps"][i]
        if trains and new is not None and wait != COLD and not torch.equal(new, old.float()):
            overlap = min(1.0, ((old.double().T @ new.double()).square().sum() / old.shape[1]).item())
            queue = torch.cat([queue[1:], torch.tensor([overlap])])
            # A mean that a rounding error puts on either side of the threshold is not drawn: overlaps are not round numbers.
            if queue.mean() >= before["cos_threshold"] or (overlap > 1 - 1e-5 and after["gaps"][i] > gap):
                gap = max(gap, min(int(gap * before["gamma_proj"]), before["max_gap"]))
        torch.testing.assert_close(after["overlaps"][i], queue, rtol=0, atol=1e-5, equal_nan=True)
        assert after["gaps"][i] == gap
    due = wait in (0, COLD)
    if trains and due:
        wait = after_step(wait, before["first_gaps"][i] if wait == COLD else gap, due, done)
    elif trains:
        wait += 1 if wait < COLD else -1
    assert after["countdowns"][i] == wait


CASES = {
    "sketch_directions": Case(directions_arguments, compare_directions),
    "subspace_iteration": Case(iteration_arguments, compare_iteration),
    "refresh_": refreshes("Orthonormal", refresh_arguments, compare_refresh, NOT_DUE),
    "refresh_ sketched": refreshes("Orthonormal", sketch_arguments, compare_sketch),
    "refresh_ full": refreshes("Orthonormal", full(refresh_arguments), compare_full, NOT_DUE),
    "refresh_ full sketched": refreshes("Orthonormal", full(sketch_arguments), compare_full),
}
