"""Fused optimizer steps."""

import torch

from cases.bounds import Near, adam, assert_within, decayed, exact, scaled
from cases.case import Case, same_bits
from cases.draw import FLOATS
from cases.projection import back_of, drawn_basis, int8_back_of, low_rank, product_of, sums_onto
from cases.rounding import places, rounding
from lowrank_sys import reference
from lowrank_sys._ops import numerics

LIMIT = numerics.MAX_GRADIENT


def hyper(draw):
    return dict(beta1=draw.of(0.9, 0.0), beta2=draw.of(0.999, 0.5), eps=draw.of(1e-8, 1e-30), weight_decay=draw.of(0.1, 0.0))


def rate(draw):
    return torch.tensor(draw.of(0.1, 1e-3, 0.0), dtype=draw.of(torch.float32, torch.float64))


def guards(draw):
    """grad_scale, found_inf and skipped, each absent or anything."""
    grad_scale = draw.of(None, 0.5, 2.0, 0.0, 1e30, float("inf"), float("nan"))
    found_inf = draw.of(None, 0.0, 0.0, 1.0, float("nan"))
    one = draw.of((), (1,))
    return dict(
        grad_scale=None if grad_scale is None else torch.full(one, grad_scale),
        found_inf=None if found_inf is None else torch.full(one, found_inf),
        skipped=draw.of(None, torch.tensor(5)),
    )


def moments(draw, shape):
    return draw.values(*shape), draw.values(*shape).abs()


def matrix(draw, left, projected):
    """param, gradient, basis and moments of one matrix."""
    m, n, r = draw.size(), draw.size(), draw.size(1, 65)
    shape = low_rank(m, n, r, left)
    gradient = draw.values(*shape) if projected else draw.values(m, n, dtype=draw.of(*FLOATS))
    return [draw.values(m, n, dtype=draw.of(*FLOATS)), gradient, drawn_basis(draw, m if left else n, r), *moments(draw, shape)]


def names(projected):
    return ["param", "low_rank_grad" if projected else "grad", "basis", "exp_avg", "exp_avg_sq"]


def plural(name):
    return name[:-2] + "es" if name.endswith("is") else name + "s"


def one_arguments(projected, tensor):
    def arguments(draw):
        left, step = draw.of(True, False), draw.of(1, 2, 1000, 10**6)
        kind = draw.of(torch.float32, torch.float64, torch.int64)
        step = torch.tensor(step, dtype=kind) if tensor else step
        lr = rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0)
        return dict(zip(names(projected), matrix(draw, left, projected))) | dict(
            step=step, lr=lr, **hyper(draw), scale=draw.of(0.25, 1.0, 0.0), left=left, int8_gemm=draw.of(False, True)
        )

    return arguments


def list_arguments(projected):
    def arguments(draw):
        left, count = draw.of(True, False), draw.count()
        rows = [matrix(draw, left, projected) for _ in range(count)]
        columns = [list(column) for column in zip(*rows)] or [[] for _ in range(5)]
        return dict(zip(map(plural, names(projected)), columns)) | dict(
            steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
            lr=rate(draw),
            **hyper(draw),
            scale=draw.of(0.25, 1.0, 0.0),
            left=left,
            **guards(draw),
            int8_gemm=draw.of(False, True),
        )

    return arguments


def usable(r):
    """(surely usable, surely not) element by element."""
    size = r.value.abs()
    return size + r.error < LIMIT, ~r.value.isfinite() | (size - r.error >= LIMIT) & r.error.isfinite()


def assert_step(before, after, r, ok, update, new_m, new_v, settings, halves=1):
    """Weights and moments [param, exp_avg, exp_avg_sq]: stepped where ok, to the bit as they were where surely not."""
    sure, never = ok
    stepped = (decayed(before[0], update, **settings), new_m, new_v)
    for name, then, now, near in zip(("param", "exp_avg", "exp_avg_sq"), before, after, stepped):
        keep = never.expand_as(then)
        assert same_bits(then[keep], now[keep]), f"{name}: an unusable gradient changed it"
        take = sure.expand_as(then)
        assert_within(name, now[take], Near(near.value[take], near.error[take]), halves if name == "param" else 1)
        if name != "param":
            good = then.isfinite()
            assert now[good].isfinite().all(), f"{name} is no longer finite"


def check_matrix(before, after, projected, left, grad_scale, settings, int8_gemm=False):
    """One matrix of a low-rank step; returns (fewest, most) weights that may have been left out."""
    param, gradient, basis, m, v = before
    if projected:
        r = exact(gradient)
    elif int8_gemm:
        r = exact(reference.project(gradient, basis, left=left, int8_gemm=True))
    else:
        r = product_of(gradient, basis, left)
    r = scaled(grad_scale, r, operations=1)
    axis = 0 if left else 1
    sure, never = usable(r)
    sure, never = sure.all(axis, keepdim=True), never.any(axis, keepdim=True)
    g = r.select(sure, torch.zeros(()))
    new_m, new_v, update = adam(g, m, v, **settings)
    update = update.select(sure, torch.zeros(()))
    back = (int8_back_of if int8_gemm else back_of)(update, basis, left)
    settings = settings | {"sums": sums_onto(param, basis.shape[1])}
    assert_step((param, m, v), (after[0], after[3], after[4]), r, (sure, never), back, new_m, new_v, settings)
    return int(never.sum()) * param.shape[axis], int((~sure).sum()) * param.shape[axis]


def settings_of(before, step, lr):
    keys = ("beta1", "beta2", "eps", "weight_decay", "scale")
    return dict(step=float(step), lr=float(lr)) | {key: before[key] for key in keys if key in before}


def compare_one(projected):
    def compare(before, after, result):
        rows = [[arguments[name] for name in names(projected)] for arguments in (before, after)]
        check_matrix(*rows, projected, before["left"], 1.0, settings_of(before, before["step"], before["lr"]), before["int8_gemm"])

    return compare


def compare_list(columns, check_row):
    """The parts that every list form shares: counters, found_inf, skipped."""

    def compare(before, after, result):
        if before["found_inf"] is not None and before["found_inf"].item() != 0:
            for name in (*columns, "steps"):
                assert all(map(same_bits, before[name], after[name])), f"found_inf is set, but {name} was written"
            assert before["skipped"] is None or same_bits(before["skipped"], after["skipped"])
            return
        grad_scale = 1.0 if before["grad_scale"] is None else before["grad_scale"].item()
        least = most = 0
        for i, (then, now) in enumerate(zip(before["steps"], after["steps"])):
            assert now == then + 1
            rows = [[arguments[name][i] for name in columns] for arguments in (before, after)]
            low, high = check_row(*rows, before, grad_scale, settings_of(before, now, before["lr"]))
            least, most = least + low, most + high
        if before["skipped"] is not None:
            assert least <= after["skipped"] - before["skipped"] <= most

    return compare


def compare_matrices(projected):
    def check_row(then, now, before, grad_scale, settings):
        return check_matrix(then, now, projected, before["left"], grad_scale, settings, before["int8_gemm"])

    return compare_list([plural(name) for name in names(projected)], check_row)


def adamw_arguments(draw):
    count = draw.count()
    shapes = [draw.of((3,), (), (0,), (5003,), (3, 5, 7), (16, 16)) for _ in range(count)]
    tensors = [[*(draw.values(*shape, dtype=draw.of(*FLOATS)) for _ in range(2)), *moments(draw, shape)] for shape in shapes]
    columns = [list(column) for column in zip(*tensors)] or [[] for _ in range(4)]
    return dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), columns)) | dict(
        steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)], lr=rate(draw), **hyper(draw), **rounding(draw, count),
        **guards(draw),
    )  # fmt: skip


def check_adamw(then, now, before, grad_scale, settings):
    param, grad, m, v = then
    r = scaled(grad_scale, exact(grad), operations=1)
    sure, never = usable(r)
    new_m, new_v, update = adam(r.select(sure, torch.zeros(())), m, v, **settings)
    assert_step((param, m, v), (now[0], now[2], now[3]), r, (sure, never), update, new_m, new_v, settings, places(before, param))
    return int(never.sum()), int((~sure).sum())


CASES = {
    "galore_step.tensor": Case(one_arguments(False, tensor=True), compare_one(False)),
    "galore_step": Case(one_arguments(False, tensor=False), compare_one(False)),
    "galore_step.list": Case(list_arguments(False), compare_matrices(False)),
    "subspace_step.tensor": Case(one_arguments(True, tensor=True), compare_one(True)),
    "subspace_step": Case(one_arguments(True, tensor=False), compare_one(True)),
    "subspace_step.list": Case(list_arguments(True), compare_matrices(True)),
    "adamw_step": Case(adamw_arguments, compare_list(("params", "grads", "exp_avgs", "exp_avg_sqs"), check_adamw)),
}
