"""APOLLO on INT8 weights: moments and channels as in apollo_step, weights against the oracle in fp64 where no value is hostile."""

import torch

from cases import residual
from cases.bounds import Near, adam, assert_within, scaled
from cases.case import Case, replace, same_bits
from cases.gaussian import in_full
from cases.projection import product_of
from cases.qgalore import check_weight, filled, sizes
from cases.rounding import stream
from cases.steps import compare_list, guards, hyper, rate, usable
from lowrank_sys import reference
from lowrank_sys.reference import galore

NAMES = ("codes", "weight_scale", "grad", "basis", "exp_avg", "exp_avg_sq", "limiter")
LISTS = ("codes", "weight_scales", "grads", "bases", "exp_avgs", "exp_avg_sqs", "limiters")
OWN = ("per_tensor", "scale_front", "growth")


def matrix(draw, left, hostile, limited, group_size, key):
    param, *rest = residual.matrix("apollo_step", draw, left, hostile, limited, False, key)
    return [*reference.quantize_int8(param, group_size=group_size), *rest]


def one_arguments(tensor):
    def arguments(draw):
        left, hostile, size = draw.of(True, False), draw.of(False, True), sizes(draw)["group_size"]
        step = draw.of(1, 2, 1000)
        return dict(zip(NAMES, matrix(draw, left, hostile, draw.of(True, False), size, draw.of(True, False)))) | dict(
            step=torch.tensor(step) if tensor else step,
            lr=rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0),
            **hyper(draw),
            left=left,
            group_size=size,
            **residual.own("apollo_step", draw),
            **stream(draw),
        )

    return arguments


def list_arguments(draw):
    left, hostile, limited, count = draw.of(True, False), draw.of(False, True), draw.of(True, False), draw.count()
    size, key = sizes(draw)["group_size"], draw.of(True, False)
    rows = [matrix(draw, left, hostile, limited, size, key) for _ in range(count)]
    columns = [list(column) for column in zip(*rows)] or [[] for _ in NAMES]
    columns = [[] if column and column[0] is None else column for column in columns]
    drawn = [stream(draw) for _ in range(count)]
    return dict(zip(LISTS, columns)) | dict(
        steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
        lr=rate(draw),
        **hyper(draw),
        left=left,
        group_size=size,
        seed=draw.integer(-(2**63), 2**63 - 1),
        parameters=[each["parameter"] for each in drawn],
        offsets=draw.of([], [each["offset"] for each in drawn]),
        **residual.own("apollo_step", draw),
        **guards(draw),
    )


def check_matrix(then, now, before, grad_scale, settings):
    """One matrix; returns (fewest, most) weights that may have been left out."""
    codes, scale, grad, basis, m, v, limiter = then
    left = before["left"]
    axis = 0 if left else 1
    dense = in_full(basis, grad.shape[axis], m.shape[axis])
    r = scaled(grad_scale, product_of(grad, dense, left), operations=1)
    sure, never = usable(r)
    squares = (r.value.abs() + r.error).square().sum(axis, keepdim=True)
    whole = (grad.double().square() * max(1.0, grad_scale**2)).sum(axis, keepdim=True)
    sure = sure.all(axis, keepdim=True) & (squares < 2.0**127) & (whole < 2.0**127)
    never = never.any(axis, keepdim=True)
    for place in (4, 5):
        keep = never.expand_as(then[place])
        assert same_bits(then[place][keep], now[place][keep]), "an unusable gradient changed a moment"
    moves = {key: settings[key] for key in ("step", "beta1", "beta2", "eps")}
    for place, near in zip((4, 5), adam(r.select(sure, torch.zeros(())), m, v, **moves)):
        take = sure.expand_as(m)
        assert_within(("exp_avg", "exp_avg_sq")[place - 4], now[place][take], Near(near.value[take], near.error[take]))
    tensors = [t for t in (grad, basis, m, v) if t.dtype != torch.int64 and t.numel()]
    tame = all(t.isfinite().all() and t.abs().max() < 50 for t in tensors)
    lr, error = settings["lr"], torch.full(codes.shape, torch.inf, dtype=torch.float64)
    update, alpha = torch.zeros(codes.shape, dtype=torch.float64), 1.0
    if sure.all() and tame and codes.numel() and (v >= 0.1).all() and 0 < abs(grad_scale) < 4:
        want = [t if t is None or t.dtype == torch.int64 else t.double() for t in replace(list(then[2:]), torch.clone)]
        own = {key: before[key] for key in (*OWN, "scale")}
        reference.named("apollo_step")(update, want[0] * grad_scale, *want[1:], lr=lr, weight_decay=0.0, left=left, **moves, **own)
        low = galore.project(grad.double() * grad_scale, dense.double(), left=left)
        least = low.square().sum(axis).min().sqrt()
        share = 2.0**-20 * (grad.double() * grad_scale).abs().max() * grad.shape[axis] ** 0.5 / max(least, 1e-30) + 2.0**-12
        error = share * update.abs().max() * torch.ones_like(update)
    check_weight(
        then[:2],
        now[:2],
        Near(update, error),
        never.expand_as(codes),
        alpha=alpha,
        decay=1 - lr * settings["weight_decay"],
        group_size=before["group_size"],
    )
    return int(never.sum()) * codes.shape[axis], int((~sure).sum()) * codes.shape[axis]


def compare_one(before, after, result):
    rows = [[arguments[name] for name in NAMES] for arguments in (before, after)]
    keys = ("beta1", "beta2", "eps", "weight_decay")
    check_matrix(*rows, before, 1.0, dict(step=float(before["step"]), lr=float(before["lr"])) | {key: before[key] for key in keys})


def compare_many(before, after, result):
    if before["found_inf"] is not None and before["found_inf"].item() != 0:
        compare_list([name for name in LISTS if before[name]], check_matrix)(before, after, result)
    else:
        compare_list(LISTS, check_matrix)(filled(before, ("limiters",)), filled(after, ("limiters",)), result)


CASES = {
    "apollo_int8_step.tensor": Case(one_arguments(tensor=True), compare_one),
    "apollo_int8_step": Case(one_arguments(tensor=False), compare_one),
    "apollo_int8_step.list": Case(list_arguments, compare_many),
}
