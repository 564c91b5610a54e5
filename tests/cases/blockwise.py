"""Blockwise 8-bit codes: exact; and steps whose moments are stored so, within what fp32 may be off by and half a gap of the map."""

import torch

from cases.bounds import UNIT, Near, adam, assert_within, decayed, exact, scaled
from cases.case import Case, exactly, same_bits
from cases.draw import FLOATS
from cases.int4 import drawn_int4, group_size
from cases.projection import back_of, drawn_basis, low_rank, product_of, sums_onto
from cases.rounding import places, rounding
from cases.steps import compare_list, guards, hyper, rate, settings_of, usable
from lowrank_sys import reference
from lowrank_sys._ops.blockwise import BLOCK, absmax_shape, is_by_row
from lowrank_sys.reference.blockwise import dynamic_map

NORMAL = torch.finfo(torch.float32).tiny
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
BASES = ("bases", "basis_scales", "basis_offsets")
LISTS = ("exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes")


def any_shape(draw):
    return draw.of((3,), (), (0,), (256,), (257,), (5003,), (3, 5, 70), (16, 33))


def codes(draw, shape):
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def moments(draw, shape, by_row=True):
    """Codes of both moments, then an absmax each."""
    return [codes(draw, shape), codes(draw, shape), *(draw.values(*absmax_shape(shape, by_row)).abs() for _ in range(2))]


def quantize_arguments(draw):
    shape = any_shape(draw)
    return dict(
        x=draw.values(*shape, dtype=draw.of(*FLOATS)), signed=draw.of(True, False), by_row=len(shape) > 1 and draw.of(True, False)
    )


def dequantize_arguments(draw):
    shape = any_shape(draw)
    absmax = draw.values(*absmax_shape(shape, len(shape) > 1 and draw.of(True, False)))
    return dict(codes=codes(draw, shape), absmax=absmax, signed=draw.of(True, False))


def padded(x, value, by_row):
    """x, flat or each of its rows, in rows of a block."""
    rows = x if by_row else x.reshape(1, -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK), value=value).view(-1, BLOCK)


def half_gaps(signed):
    """How far the nearest value of each code may be."""
    values = dynamic_map(signed).double()
    gaps = values.diff() / 2
    first = 1 + values[0] if signed else 0  # there is no -1: the lowest code takes everything below it
    return torch.maximum(torch.cat([torch.tensor([float(first)]), gaps]), torch.cat([gaps, torch.tensor([0.0])]))


def assert_codes(name, before, after, near, known, never, signed):
    """(codes, absmax) store `near` where all of a block is `known`; blocks that are `never` usable keep their bytes."""
    by_row = is_by_row(*before)
    keep = padded(never, True, by_row).all(dim=1)
    flat = [(padded(codes, 127 if signed else 0, by_row), absmax.view(-1)) for codes, absmax in (before, after)]
    for then, now in zip(*flat):
        assert same_bits(then[keep], now[keep]), f"{name}: a block without a usable gradient changed"
    value, error = padded(near.value, 0.0, by_row), padded(near.error, 0.0, by_row)
    check = ~keep & padded(known, True, by_row).all(dim=1) & (value.isfinite() & error.isfinite()).all(dim=1)
    value, error, absmax = value[check], error[check], flat[1][1][check].double()
    if not check.any():
        return
    most, least = (value.abs() + error).amax(dim=1), (value.abs() - error).amax(dim=1)
    assert (absmax <= most).all() and ((absmax >= least) | (least < NORMAL)).all(), f"{name}: absmax"
    index = flat[1][0][check].long()
    decoded = dynamic_map(signed).double()[index] * absmax[:, None]
    allowed = error + (half_gaps(signed)[index] + 16 * UNIT) * absmax[:, None] + NORMAL
    assert ((decoded - value).abs() <= allowed).all(), f"{name}: codes"


def check_moments(before, after, r, sure, never, settings):
    """Both moments of one tensor; returns the update where sure, else 0."""
    sure, never = (x.expand(r.value.shape) for x in (sure, never))
    stored = [(b, s) for b, s in zip(zip(before[:2], before[2:]), (True, False))]
    old = [exact(reference.dequantize_blockwise(*pair, signed=signed)) for pair, signed in stored]
    *new, update = adam(r.select(sure, torch.zeros(())), *(near.value.float() for near in old), **settings)
    for i, (pair, signed) in enumerate(stored):
        assert_codes(MOMENTS[i], pair, (after[i], after[i + 2]), new[i].select(sure, old[i].value), sure | never, never, signed)
    return update.select(sure, torch.zeros(()))


def check_weights(then, now, update, sure, never, settings, halves=1):
    sure, never = sure.expand_as(then), never.expand_as(then)
    assert same_bits(then[never], now[never]), "param: an unusable gradient changed it"
    near = decayed(then, update, **settings)
    assert_within("param", now[sure], Near(near.value[sure], near.error[sure]), halves)


def adam_arguments(draw):
    count = draw.count()
    shapes = [any_shape(draw) for _ in range(count)]
    rows = [
        [draw.values(*shape, dtype=draw.of(*FLOATS)), draw.values(*shape, dtype=draw.of(*FLOATS)), *moments(draw, shape, False)]
        for shape in shapes
    ]
    columns = [list(column) for column in zip(*rows)] or [[] for _ in range(6)]
    return dict(zip(("params", "grads", *LISTS), columns)) | dict(
        steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)], lr=rate(draw), **hyper(draw), **rounding(draw, count),
        **guards(draw),
    )  # fmt: skip


def check_adam(then, now, before, grad_scale, settings):
    r = scaled(grad_scale, exact(then[1]), operations=1)
    sure, never = usable(r)
    update = check_moments(then[2:], now[2:], r, sure, never, settings)
    check_weights(then[0], now[0], update, sure, never, settings, places(before, then[0]))
    return int(never.sum()), int((~sure).sum())


def matrix(draw, left, projected=False, size=None):
    """param, gradient (R if projected), the basis (its parts in groups of `size` entries, if given) and moments of one matrix."""
    m, n, r = draw.size(), draw.size(), draw.size(1, 65)
    d, shape = m if left else n, low_rank(m, n, r, left)
    gradient = draw.values(*shape) if projected else draw.values(m, n, dtype=draw.of(*FLOATS))
    basis = [drawn_basis(draw, d, r)]
    if size is not None:
        drawn = drawn_int4(draw, d, r, size)
        basis = [drawn[name] for name in ("packed", "scale", "offset")]
    return [draw.values(m, n, dtype=draw.of(*FLOATS)), gradient, *basis, *moments(draw, shape)]


def galore_arguments(tensor):
    def arguments(draw):
        left, step = draw.of(True, False), draw.of(1, 2, 1000)
        step = torch.tensor(step, dtype=draw.of(torch.float32, torch.float64, torch.int64)) if tensor else step
        lr = rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0)
        return dict(zip(("param", "grad", "basis", *MOMENTS), matrix(draw, left))) | dict(
            step=step, lr=lr, **hyper(draw), scale=draw.of(0.25, 1.0, 0.0), left=left
        )

    return arguments


def columns(projected, int4):
    """Names of the lists of a step, without steps."""
    return ("params", "low_rank_grads" if projected else "grads", *(BASES if int4 else BASES[:1]), *LISTS)


def list_arguments(projected, int4):
    def arguments(draw):
        left, count, size = draw.of(True, False), draw.count(), group_size(draw) if int4 else None
        rows = [matrix(draw, left, projected, size) for _ in range(count)]
        lists = [list(column) for column in zip(*rows)] or [[] for _ in columns(projected, int4)]
        return (
            dict(zip(columns(projected, int4), lists))
            | ({"group_size": size} if int4 else {})
            | dict(
                steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
                lr=rate(draw),
                **hyper(draw),
                scale=draw.of(0.25, 1.0, 0.0),
                left=left,
                **guards(draw),
            )
        )

    return arguments


def compare_matrices(projected, int4):
    """Bases in INT4 are those that the oracle decodes."""

    def check_row(then, now, before, grad_scale, settings):
        if int4:
            d = then[0].shape[0 if before["left"] else 1]
            basis = reference.dequantize_int4(*then[2:5], d=d, group_size=before["group_size"])
            then, now = ([*row[:2], basis, *row[5:]] for row in (then, now))
        return check_matrix(then, now, before, grad_scale, settings, projected)

    return compare_list(columns(projected, int4), check_row)


def check_matrix(then, now, before, grad_scale, settings, projected=False):
    left = before["left"]
    r = scaled(grad_scale, exact(then[1]) if projected else product_of(then[1], then[2], left), operations=1)
    axis = 0 if left else 1
    sure, never = usable(r)
    sure, never = sure.all(axis, keepdim=True), never.any(axis, keepdim=True)
    update = check_moments(then[3:], now[3:], r, sure, never, settings)
    settings = settings | {"sums": sums_onto(then[0], then[2].shape[1])}
    check_weights(then[0], now[0], back_of(update, then[2], left), sure, never, settings)
    return int(never.sum()) * then[0].shape[axis], int((~sure).sum()) * then[0].shape[axis]


def compare_one(before, after, result):
    rows = [[arguments[name] for name in ("param", "grad", "basis", *MOMENTS)] for arguments in (before, after)]
    check_matrix(*rows, before, 1.0, settings_of(before, before["step"], before["lr"]))


def low_rank_arguments(draw):
    left, count = draw.of(True, False), draw.count()
    shapes = [(draw.size(), draw.size()) for _ in range(count)]
    rows = [[draw.values(*shape), draw.values(*shape, dtype=draw.of(*FLOATS)), *moments(draw, shape)] for shape in shapes]
    columns = [list(column) for column in zip(*rows)] or [[] for _ in range(6)]
    drawn = guards(draw)
    return dict(zip(("low_rank_grads", "updates", *LISTS), columns)) | dict(
        steps=[torch.tensor(float(draw.of(1, 9))) for _ in range(count)],
        beta1=draw.of(0.9, 0.0),
        beta2=draw.of(0.999, 0.5),
        eps=draw.of(1e-8, 1e-30),
        left=left,
        grad_scale=drawn["grad_scale"],
        found_inf=drawn["found_inf"],
    )


def compare_low_rank(before, after, result):
    if before["found_inf"] is not None and before["found_inf"].item() != 0:
        for name in ("updates", *LISTS):
            assert all(map(same_bits, before[name], after[name])), f"found_inf is set, but {name} was written"
        return
    grad_scale = 1.0 if before["grad_scale"] is None else before["grad_scale"].item()
    for i, gradient in enumerate(before["low_rank_grads"]):
        r = scaled(grad_scale, exact(gradient), operations=1)
        sure, never = usable(r)
        axis = 0 if before["left"] else 1
        sure, never = sure.all(axis, keepdim=True), never.any(axis, keepdim=True)
        settings = dict(step=before["steps"][i].item(), beta1=before["beta1"], beta2=before["beta2"], eps=before["eps"])
        update = check_moments(*([x[name][i] for name in LISTS] for x in (before, after)), r, sure, never, settings)
        sure, never, got = sure.expand_as(gradient), never.expand_as(gradient), after["updates"][i]
        assert got[never].isnan().all()
        assert_within("update", got[sure], Near(update.value[sure], update.error[sure]))


CASES = {
    "quantize_blockwise": Case(quantize_arguments, exactly(reference.quantize_blockwise)),
    "dequantize_blockwise": Case(dequantize_arguments, exactly(reference.dequantize_blockwise)),
    "adam_8bit_": Case(adam_arguments, compare_list(("params", "grads", *LISTS), check_adam)),
    "adam_8bit_low_rank_": Case(low_rank_arguments, compare_low_rank),
    "galore_step_8bit.tensor": Case(galore_arguments(tensor=True), compare_one),
    "galore_step_8bit": Case(galore_arguments(tensor=False), compare_one),
    **{
        f"{'subspace' if projected else 'galore'}_step_8bit.{'int4' if int4 else 'list'}": Case(
            list_arguments(projected, int4), compare_matrices(projected, int4)
        )
        for projected in (False, True)
        for int4 in (False, True)
    },
}
