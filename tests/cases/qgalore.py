"""Steps on INT8 weights: exact where products are exact, else within one step of the scale of what fp32 may be off by."""

import torch

from cases.blockwise import LISTS, MOMENTS, check_moments, moments
from cases.bounds import MAX, UNIT, Near, added, exact, scaled
from cases.case import Case, exactly
from cases.draw import FLOATS
from cases.int4 import drawn_int4
from cases.int8 import quantized
from cases.projection import back_of, drawn_basis, product_of
from cases.rounding import stream
from cases.steps import compare_list, guards, hyper, rate, settings_of, usable
from lowrank_sys import reference
from lowrank_sys.reference.int8 import LEAST_SCALE, grouped
from lowrank_sys.reference.int8 import UNIT as RANGE

NAMES = ("codes", "weight_scale", "{gradient}", "basis", "basis_scale", "basis_offset", *MOMENTS)


def check_weight(before, after, update, never, *, alpha, decay, group_size):
    """(codes, scale) <- decay W + alpha update, within one step of the scale that a group has afterwards.

    update: a `Near`; an infinite error says that fp32 may have left the element out. never: elements that certainly are.
    """
    (codes, scale), (new_codes, new_scale) = before, after
    pieces = [grouped(x, group_size) for x in (codes.double(), new_codes.double(), update.value, update.error, never.double())]
    old_code, new_code, value, error, never = pieces
    never, real = never > 0, grouped(torch.ones(codes.shape), group_size) > 0
    never = never | ~real
    kept = scale.view(torch.int32) == new_scale.view(torch.int32)
    still = kept[..., None] & (old_code == new_code)
    assert still[never.all(2)].all(), "a group without a usable update changed"
    old = exact(old_code.float() * scale[..., None])
    step = scaled(alpha, Near(value, error))
    whole = added(scaled(decay, old), step)
    # What is left out keeps its value; what may have been is either.
    unsure = ~whole.error.isfinite() | ~whole.value.isfinite() | (whole.value.abs() + whole.error >= MAX)
    target = torch.where(never, old.value, whole.value)
    slack = torch.where(never, 0.0, whole.error)
    got = new_code * new_scale.double()[..., None]
    sound = old.value.isfinite().all(2) & new_scale.isfinite() & scale.isfinite()
    assert still[~scale.isfinite()].all(), "a scale that is not finite changed"
    one = new_scale.double().abs()[..., None] * (1 + 2.0**-12) + 128 * LEAST_SCALE + 4 * UNIT * target.abs()
    near = (got - target).abs() <= slack + one
    assert (near | unsure | ~sound[..., None] | still).all(), "a weight is more than a step of its scale off"
    # A new scale is that of the largest value.
    fresh = sound & ~kept & ~(unsure & ~never).any(2)
    if fresh.any():
        most = (target.abs() + slack)[fresh].amax(1) * (1 + 4 * UNIT) / RANGE + LEAST_SCALE
        least = (target.abs() - slack)[fresh].amax(1) * (1 - 4 * UNIT) / RANGE - LEAST_SCALE
        chosen = new_scale.double()[fresh]
        assert ((chosen <= most) & (chosen >= least)).all(), "a new scale is not that of the largest value"


def drawn_weight(draw, m, n):
    return quantized(draw, m, n, draw.of(32, 64, 256, 1024))


def any_basis(draw, d, r, int4):
    """basis, its scale and offset, and the size of its groups."""
    if not int4:
        return drawn_basis(draw, d, r), None, None, draw.of(256, 32)
    drawn = drawn_int4(draw, d, r)
    return tuple(drawn[name] for name in ("packed", "scale", "offset", "group_size"))


def dense(basis, scale, offset, d, group_size):
    return basis if scale is None else reference.dequantize_int4(basis, scale, offset, d=d, group_size=group_size)


def whole_numbers(draw, *shape):
    """Products of these are exact in fp32."""
    return draw.values(*shape, hostile=False).mul(4).round()


def back_arguments(tensor):
    def arguments(draw):
        m, n, r, left, int4, whole = draw.size(), draw.size(), draw.size(1, 65), *(draw.of(True, False) for _ in range(3))
        weight, d = drawn_weight(draw, m, n), m if left else n
        basis, scale, offset, size = any_basis(draw, d, r, int4)
        shape = _shape(m, n, r, left)
        low_rank = whole_numbers(draw, *shape) if whole else draw.values(*shape)
        if whole and int4:
            scale, offset = (whole_numbers(draw, *scale.shape) for _ in range(2))
        elif whole:
            basis = whole_numbers(draw, d, r).to(basis.dtype)
        numbers = dict(alpha=draw.of(1.0, -0.25, 1e-3, 0.0), decay=draw.of(1.0, 0.99, 0.0, -2.0), step=draw.integer(0, 2**32 - 1))
        if tensor:
            numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        return weight | dict(
            low_rank=low_rank,
            basis=basis,
            basis_scale=scale,
            basis_offset=offset,
            basis_group_size=size,
            left=left,
            **stream(draw),
            **numbers,
        )

    return arguments


def _shape(m, n, r, left):
    return (r, n) if left else (m, r)


def compare_back(before, after, result):
    b = dense(
        before["basis"],
        before["basis_scale"],
        before["basis_offset"],
        before["codes"].shape[0 if before["left"] else 1],
        before["basis_group_size"],
    )
    x = before["low_rank"]
    if b.abs().sum() + x.abs().sum() < 2.0**20 and torch.equal(b.float(), b.float().round()) and torch.equal(x, x.round()):
        exactly(reference.back_project_int8_)(before, after, result)
    near = back_of(exact(x), b, before["left"])
    check_weight(
        *([t["codes"], t["scale"]] for t in (before, after)),
        near,
        ~near.value.isfinite(),
        alpha=float(before["alpha"]),
        decay=float(before["decay"]),
        group_size=before["group_size"],
    )


def matrix(draw, left, projected, int4, group_size, basis_group_size):
    m, n, r = draw.size(), draw.size(), draw.size(1, 65)
    shape = _shape(m, n, r, left)
    codes, scale = reference.quantize_int8(draw.values(m, n), group_size=group_size)
    gradient = draw.values(*shape) if projected else draw.values(m, n, dtype=draw.of(*FLOATS))
    basis, basis_scale, basis_offset = drawn_basis(draw, m if left else n, r), None, None
    if int4:
        basis, basis_scale, basis_offset = reference.quantize_int4(basis, group_size=basis_group_size)
    return [codes, scale, gradient, basis, basis_scale, basis_offset, *moments(draw, shape)]


def names(projected):
    return [name.format(gradient="low_rank_grad" if projected else "grad") for name in NAMES]


def plurals(projected):
    return ["codes", "weight_scales", "low_rank_grads" if projected else "grads", "bases", "basis_scales", "basis_offsets", *LISTS]


def sizes(draw):
    return dict(group_size=draw.of(256, 32, 64), basis_group_size=draw.of(256, 32, 64))


def one_arguments(projected, tensor):
    def arguments(draw):
        left, step, both = draw.of(True, False), draw.of(1, 2, 1000), sizes(draw)
        step = torch.tensor(step, dtype=draw.of(torch.float32, torch.float64, torch.int64)) if tensor else step
        return dict(zip(names(projected), matrix(draw, left, projected, draw.of(True, False), **both))) | dict(
            step=step,
            lr=rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0),
            **hyper(draw),
            scale=draw.of(0.25, 1.0, 0.0),
            left=left,
            **both,
            **stream(draw),
        )

    return arguments


def list_arguments(projected):
    def arguments(draw):
        left, count, int4, both = draw.of(True, False), draw.count(), draw.of(True, False), sizes(draw)
        rows = [matrix(draw, left, projected, int4, **both) for _ in range(count)]
        columns = [list(column) for column in zip(*rows)] or [[] for _ in range(10)]
        columns = [[] if column and column[0] is None else column for column in columns]
        drawn = [stream(draw) for _ in range(count)]
        return dict(zip(plurals(projected), columns)) | dict(
            steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
            lr=rate(draw),
            **hyper(draw),
            scale=draw.of(0.25, 1.0, 0.0),
            left=left,
            seed=draw.integer(-(2**63), 2**63 - 1),
            **both,
            parameters=[each["parameter"] for each in drawn],
            offsets=draw.of([], [each["offset"] for each in drawn]),
            **guards(draw),
        )

    return arguments


def check_matrix(then, now, projected, before, grad_scale, settings):
    left = before["left"]
    codes, _, gradient, basis, basis_scale, basis_offset, *stored = then
    b = dense(basis, basis_scale, basis_offset, codes.shape[0 if left else 1], before["basis_group_size"])
    r = scaled(grad_scale, exact(gradient) if projected else product_of(gradient, b, left), operations=1)
    axis = 0 if left else 1
    sure, never = usable(r)
    sure, never = sure.all(axis, keepdim=True), never.any(axis, keepdim=True)
    update = check_moments(stored, now[6:], r, sure, never, settings)
    back = back_of(update, b, left)
    back = Near(back.value, torch.where(sure, back.error, torch.inf))
    lr, scale = settings["lr"], settings["scale"]
    check_weight(
        then[:2],
        now[:2],
        back,
        never.expand_as(codes) | ~back.value.isfinite(),
        alpha=-lr * scale,
        decay=1 - lr * settings["weight_decay"],
        group_size=before["group_size"],
    )
    return int(never.sum()) * codes.shape[axis], int((~sure).sum()) * codes.shape[axis]


def compare_one(projected):
    def compare(before, after, result):
        rows = [[arguments[name] for name in names(projected)] for arguments in (before, after)]
        check_matrix(*rows, projected, before, 1.0, settings_of(before, before["step"], before["lr"]))

    return compare


def filled(arguments, optional):
    """Optional lists with a None in every place of an empty one."""
    return arguments | {name: arguments[name] or [None] * len(arguments["codes"]) for name in optional}


def compare_many(projected):
    def check_row(then, now, before, grad_scale, settings):
        return check_matrix(then, now, projected, before, grad_scale, settings)

    columns = plurals(projected)

    def compare(before, after, result):
        if before["found_inf"] is not None and before["found_inf"].item() != 0:
            compare_list([name for name in columns if before[name]], check_row)(before, after, result)
        else:
            optional = ("basis_scales", "basis_offsets")
            compare_list(columns, check_row)(filled(before, optional), filled(after, optional), result)

    return compare


CASES = {
    "back_project_int8_.tensor": Case(back_arguments(tensor=True), compare_back),
    "back_project_int8_": Case(back_arguments(tensor=False), compare_back),
}
for _name, _projected in (("qgalore_step", False), ("qgalore_subspace_step", True)):
    CASES[f"{_name}.tensor"] = Case(one_arguments(_projected, tensor=True), compare_one(_projected))
    CASES[_name] = Case(one_arguments(_projected, tensor=False), compare_one(_projected))
    CASES[f"{_name}.list"] = Case(list_arguments(_projected), compare_many(_projected))
