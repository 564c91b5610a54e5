"""The one step, over all combinations of policies: tame values against the oracle, any others for what no step may do.

The named steps have bounds of their own, from the arguments, for the combinations that they stand for.
"""

import torch

from cases.case import Case, replace, same_bits
from cases.draw import FLOATS
from cases.projection import low_rank
from cases.rounding import rounding
from cases.steps import guards, hyper, moments, rate
from lowrank_sys import reference
from lowrank_sys._ops.step import BASES, LIMITED, MOMENTS, RULES, WEIGHTS


def matrix(draw, weight, basis, kept, remainder, left, projected, hostile, limited, gram, sizes):
    """[weight, its scale, gradient, basis, parts, states] of one matrix."""
    m, n, r = draw.size(), draw.size(), draw.size(1, 33)
    d, shape = m if left else n, low_rank(m, n, r, left)
    w = draw.values(m, n, hostile=hostile)
    codes, scale = reference.quantize_int8(w, group_size=sizes[0]) if weight == "int8" else (w.to(draw.of(*FLOATS)), None)
    gradient = draw.values(*(shape if projected else (m, n)), hostile=hostile)
    gradient = gradient if projected else gradient.to(draw.of(*FLOATS))
    b, parts = draw.values(d, r, hostile=False) / max(1, d) ** 0.5, []
    if basis == "int4":
        b, *parts = reference.quantize_int4(b, group_size=sizes[1])
        parts += [torch.eye(r)] if gram else []
    elif basis == "key":
        b = torch.tensor([-7, 3, 11, draw.of(0, 5)])
    else:
        parts = [b.T @ b] if gram else []
        b = b.to(draw.of(*FLOATS))
    states = (
        moments(draw, shape) if hostile else [draw.values(*shape, hostile=False), draw.values(*shape, hostile=False).abs() + 0.1]
    )
    if kept == "8bit":
        coded = [reference.quantize_blockwise(x, signed=signed, by_row=True) for x, signed in zip(states, (True, False))]
        states = [codes for codes, _ in coded] + [absmax for _, absmax in coded]
    return [codes, scale, gradient, b, parts, [*states, *([torch.tensor(draw.of(0.0, 0.5))] if limited else [])]]


def columns(rows):
    """Lists of lists, one a row, as one list: all firsts, then all seconds."""
    return [tensor for column in zip(*rows) for tensor in column]


def arguments(draw):
    weight, basis, kept, remainder = draw.of(*WEIGHTS), draw.of(*BASES), draw.of(*MOMENTS), draw.of(*RULES)
    remainder = "scaled-gradient" if basis == "key" else remainder
    left, hostile, count = draw.of(True, False), draw.of(False, False, True), draw.count()
    projected = remainder == "none" and draw.of(False, True)
    limited, gram = remainder in LIMITED and draw.of(True, False), remainder == "scaled-residual" and draw.of(True, False)
    sizes = draw.of(256, 32), draw.of(256, 32)
    rows = [matrix(draw, weight, basis, kept, remainder, left, projected, hostile, limited, gram, sizes) for _ in range(count)]
    weights, scales, gradients, bases, parts, states = map(list, zip(*rows)) if rows else [[] for _ in range(6)]
    how = rounding(draw, count)
    if weight == "int8" and not how["parameters"]:
        how |= dict(parameters=list(range(count)))
    advance = draw.of(True, True, False)
    return dict(
        weights=weights, weight_scales=scales if weight == "int8" else [], gradients=gradients, bases=bases,
        basis_parts=columns(parts), states=columns(states),
        steps=[torch.tensor(float(draw.of(1, 9)), dtype=torch.float32 if advance else torch.float64) for _ in range(count)],
        lr=rate(draw), weight=weight, basis=basis, moments=kept, rule=RULES[remainder], remainder=remainder, left=left,
        projected=projected, advance=advance, **hyper(draw), scale=draw.of(0.25, 1.0), residual_scale=draw.of(0.1, 1.0),
        sign=draw.of(True, False), per_tensor=draw.of(False, True), scale_front=draw.of(False, True), growth=1.01,
        group_size=sizes[0], basis_group_size=sizes[1], **how, **guards(draw), op="step",
    )  # fmt: skip


WRITTEN = ("weights", "weight_scales", "states", "steps")


def compare(before, after, result):
    if before["found_inf"] is not None and before["found_inf"].item() != 0:
        for name in (*WRITTEN, "skipped"):
            assert same_everywhere(before[name], after[name]), f"found_inf is set, but {name} was written"
        return
    for then, now in zip(before["steps"], after["steps"]):
        assert now == then + before["advance"]
    want = {name: replace(value, torch.clone) for name, value in before.items()}
    reference.step(**want)
    if is_tame(before):
        for name in ("weights", "states"):
            for i, (then, got, wanted) in enumerate(zip(before[name], after[name], want[name])):
                assert_alike(f"{name}[{i}]", then, got, wanted)
        if before["skipped"] is not None:
            assert after["skipped"] == want["skipped"]


def same_everywhere(then, now):
    if not isinstance(then, list):
        return then is None or same_bits(then, now)
    return all(map(same_bits, then, now))


def is_tame(arguments):
    """No value is hostile, second moments are away from zero, and a residual is more than rounding."""
    floats = [t for name in ("weights", "gradients", "bases", "states") for t in arguments[name] if t.dtype.is_floating_point]
    scale = arguments["grad_scale"]
    whole = [b.shape[0] <= b.shape[1] for b in arguments["bases"] if b.dim() == 2]
    if arguments["remainder"] in ("scaled-residual", "state-free") and any(whole):
        return False
    return all(t.isfinite().all() and (not t.numel() or t.abs().max() < 50) for t in floats) and (
        scale is None or 0 < abs(scale.item()) < 4
    )


def assert_alike(name, then, got, want):
    """Codes are neighbours but for a few; values differ by rounding, but for signs of what is nearly zero."""
    if got.dtype in (torch.uint8, torch.int8):
        off = (got.int() - want.int()).abs()
        assert not off.numel() or (off <= 1).float().mean() >= 0.97 - 2 / off.numel(), f"{name}: codes differ by {off.max()}"
        return
    moved = (want.double() - then.double()).abs()
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[got.dtype]
    allowed = unit * want.double().abs() + 2e-3 * (moved.max() if moved.numel() else 0) + 1e-6
    off = (got.double() - want.double()).abs() > allowed
    assert not off.numel() or off.float().mean() <= 0.02 + 2 / off.numel(), f"{name}: {int(off.sum())} of {off.numel()} differ"


CASES = {"step": Case(arguments, compare)}
