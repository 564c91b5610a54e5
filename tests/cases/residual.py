"""APOLLO, Fira, FRUGAL: moments within bounds; channels that are not usable to the bit; weights against the oracle in fp64 where
no value is hostile (a ratio of norms has no bound that follows from the arguments where squares overflow or vanish)."""

import torch

from cases.bounds import UNITS, Near, adam, assert_within, scaled
from cases.case import Case, replace, same_bits
from cases.draw import FLOATS
from cases.gaussian import in_full
from cases.projection import low_rank, product_of
from cases.steps import compare_list, guards, hyper, moments, rate, usable
from lowrank_sys import reference
from lowrank_sys.reference import galore

NAMES = ("param", "grad", "basis", "exp_avg", "exp_avg_sq")
EXTRAS = {"apollo_step": ("limiter",), "fira_step": ("limiter", "gram"), "frugal_step": ()}


def plural(name):
    return name[:-2] + "es" if name.endswith("is") else name + "s"


def own(op, draw):
    if op == "apollo_step":
        return dict(scale=draw.of(1.0, 4.0), per_tensor=draw.of(False, True), scale_front=draw.of(False, True), growth=1.01)
    if op == "fira_step":
        return dict(alpha=draw.of(0.25, 1.0, 0.0), growth=1.01)
    return dict(scale=draw.of(0.25, 1.0), residual_scale=draw.of(0.1, 0.0), sign=draw.of(True, False))


def matrix(op, draw, left, hostile, limited, gram, key=False):
    m, n, r = draw.size(), draw.size(), draw.size(1, 33)
    d, shape = m if left else n, low_rank(m, n, r, left)
    basis = draw.values(d, r, hostile=False) / max(1, d) ** 0.5
    # A residual that is nothing but rounding has no norm to compare: then the basis spans no more than a part.
    basis = basis.to(draw.of(*FLOATS)) if not key else torch.tensor([-7, 3, 11, draw.of(0, 5)])
    row = [
        draw.values(m, n, dtype=draw.of(*FLOATS), hostile=hostile),
        draw.values(m, n, dtype=draw.of(*FLOATS), hostile=hostile),
        basis,
    ]
    row += moments(draw, shape) if hostile else [draw.values(*shape, hostile=False), draw.values(*shape, hostile=False).abs() + 0.1]
    if op != "frugal_step":
        row.append(torch.tensor(draw.of(0.0, 0.5)) if limited else None)
    if op == "fira_step":
        row.append(basis.float().T @ basis.float() if gram else None)
    return row


def has_key(op, draw):
    """Whether the bases are Gaussian, from their keys."""
    return op == "apollo_step" and draw.of(True, False)


def one_arguments(op, tensor):
    def arguments(draw):
        left, hostile = draw.of(True, False), draw.of(False, True)
        step = draw.of(1, 2, 1000)
        return dict(
            zip(NAMES + EXTRAS[op], matrix(op, draw, left, hostile, draw.of(True, False), draw.of(True, False), has_key(op, draw)))
        ) | dict(
            step=torch.tensor(step) if tensor else step,
            lr=rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0),
            **hyper(draw),
            left=left,
            **own(op, draw),
        )

    return arguments


def list_arguments(op):
    def arguments(draw):
        left, hostile, count = draw.of(True, False), draw.of(False, True), draw.count()
        limited, gram, key = draw.of(True, False), draw.of(True, False), has_key(op, draw)
        rows = [matrix(op, draw, left, hostile, limited, gram, key) for _ in range(count)]
        names = NAMES + EXTRAS[op]
        columns = [list(column) for column in zip(*rows)] or [[] for _ in names]
        columns = [[] if None in [type(x) if x is not None else None for x in column] else column for column in columns]
        return dict(zip(map(plural, names), columns)) | dict(
            steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
            lr=rate(draw),
            **hyper(draw),
            left=left,
            **own(op, draw),
            **guards(draw),
        )

    return arguments


def check_matrix(op, before, after, left, grad_scale, settings):
    """One matrix of a step; returns (fewest, most) weights that may have been left out."""
    param, grad, basis, m, v = before[:5]
    axis = 0 if left else 1
    dense = in_full(basis, param.shape[axis], m.shape[axis])
    r = scaled(grad_scale, product_of(grad, dense, left), operations=1)
    sure, never = usable(r)
    squares = (r.value.abs() + r.error).square().sum(axis, keepdim=True)
    whole = (grad.double().square() * max(1.0, grad_scale**2)).sum(axis, keepdim=True)
    sure = sure.all(axis, keepdim=True) & (squares < 2.0**127) & (whole < 2.0**127)
    never = never.any(axis, keepdim=True)
    for place in (0, 3, 4):
        keep = never.expand_as(before[place])
        assert same_bits(before[place][keep], after[place][keep]), "an unusable gradient changed a channel"
    g = r.select(sure, torch.zeros(()))
    moves = {key: settings[key] for key in ("step", "beta1", "beta2", "eps")}
    for place, near in zip((3, 4), adam(g, m, v, **moves)):
        take = sure.expand_as(m)
        assert_within(("exp_avg", "exp_avg_sq")[place - 3], after[place][take], Near(near.value[take], near.error[take]))
    tame = all(
        t is None or t.dtype == torch.int64 or (t.isfinite().all() and t.abs().max() < 50) for t in before if t is None or t.numel()
    )
    if sure.all() and tame and param.numel() and (v >= 0.1).all() and 0 < abs(grad_scale) < 4:
        check_weights(op, before, after, left, grad_scale, settings, dense)
    return int(never.sum()) * param.shape[axis], int((~sure).sum()) * param.shape[axis]


def check_weights(op, before, after, left, grad_scale, settings, dense):
    """Tame values: sums of fp32 with at most a few hundred terms, of size 50 at most."""
    if op == "fira_step" and settings["alpha"] == 1.0 and before[2].shape[0] <= before[2].shape[1]:
        return  # a residual of nothing but rounding
    want = [t if t is None or t.dtype == torch.int64 else t.double() for t in replace(list(before), torch.clone)]
    want[1] = want[1] * grad_scale
    if op == "frugal_step" and settings["sign"]:
        low = galore.project(want[1], want[2], left=left)
        near_zero = (want[1] - galore.back(low, want[2], left)).abs() < 1e-3 * (1 + low.abs().max())
    else:
        near_zero = torch.zeros(before[0].shape, dtype=torch.bool)
    reference.named(op)(*want, left=left, **settings)
    moved = (want[0] - before[0].double()).abs().max()
    r = galore.project(want[1], dense.double(), left=left)
    # s is relative to |R|, whose smallest channel loses digits to the products' rounding; a limiter compares norms of differences.
    least = r.square().sum(0 if left else 1).min().sqrt()
    share = 2.0**-20 * want[1].abs().max() * before[0].shape[0 if left else 1] ** 0.5 / max(least, 1e-30) + 2.0**-12
    error = share * moved + 2 * UNITS[before[0].dtype] * want[0].abs() + torch.where(near_zero, torch.inf, 0.0)
    assert_within("param", after[0], Near(want[0], error))


def settings_of(op, before, step, lr):
    keys = (
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "scale",
        "alpha",
        "per_tensor",
        "scale_front",
        "growth",
        "residual_scale",
        "sign",
    )
    return dict(step=float(step), lr=float(lr)) | {key: before[key] for key in keys if key in before}


def compare_one(op):
    def compare(before, after, result):
        rows = [[arguments[name] for name in NAMES + EXTRAS[op]] for arguments in (before, after)]
        check_matrix(op, *rows, before["left"], 1.0, settings_of(op, before, before["step"], before["lr"]))

    return compare


def compare_many(op):
    names = [plural(name) for name in NAMES + EXTRAS[op]]

    def check_row(then, now, before, grad_scale, settings):
        step, lr = settings["step"], settings["lr"]
        return check_matrix(op, then, now, before["left"], grad_scale, settings_of(op, before, step, lr))

    def compare(before, after, result):
        # A list that is absent as a whole holds nothing in each place.
        count = len(before["params"])
        full = [
            {name: arguments[name] or [None] * count if name in names[5:] else arguments[name] for name in arguments}
            for arguments in (before, after)
        ]
        stepped = [name for name in names if before[name] or name in names[:5]]
        found = before["found_inf"] is not None and before["found_inf"].item() != 0
        compare_list(stepped if found else names, check_row)(*full, result)

    return compare


CASES = {}
for _op in EXTRAS:
    CASES[f"{_op}.tensor"] = Case(one_arguments(_op, tensor=True), compare_one(_op))
    CASES[_op] = Case(one_arguments(_op, tensor=False), compare_one(_op))
    CASES[f"{_op}.list"] = Case(list_arguments(_op), compare_many(_op))
