"""A select x store x schedule x transport x rule x remainder x weight trains, or says which two do not go together."""

import functools
import itertools
import random
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lowrank_sys.nn import is_quantized, quantize_model
from lowrank_sys.optim import LowRankOptimizer, remainder, rules
from lowrank_sys.optim.methods import flora, frugal_blocks, gradnormlorp, gum, mofasgd, scale, sinkgd, snsm
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.schedule.roles import TRAINED, WHOLE
from lowrank_sys.schedule.schedule import Sampled, Schedule
from lowrank_sys.schedule.settling import Settling
from lowrank_sys.subspace.columns import Columns
from lowrank_sys.subspace.factors import Factors
from lowrank_sys.subspace.keys import Gaussian, Keyed, Resampled
from lowrank_sys.subspace.none import NoSubspace
from lowrank_sys.subspace.optional import OrWhole
from lowrank_sys.subspace.orthonormal import Orthonormal
from lowrank_sys.subspace.rows import Rows
from lowrank_sys.subspace.select import SELECT
from lowrank_sys.subspace.sketched_rows import SketchedRows
from lowrank_sys.subspace.transport import TRANSPORTS

SAMPLE = 30  # combinations of a store and a selector, without --full


class Store(NamedTuple):
    """A kind of subspace, the keys that choose how it keeps a basis, and names that `subspace` may have."""

    kind: object
    keys: dict
    selections: tuple


RANK = {"rank": 3, "update_proj_gap": 1}
CHOSEN = tuple(SELECT)
STORES = {
    "dense": Store(Orthonormal(), RANK, CHOSEN),
    "int4": Store(Orthonormal(), {**RANK, "quant": True}, CHOSEN),
    "own gap": Store(Orthonormal(), {**RANK, "cos_threshold": 0.4}, CHOSEN),
    "whole": Store(OrWhole(), {"rank": None}, ("randomized",)),
    "or whole": Store(OrWhole(), RANK, CHOSEN),
    "unbiased": Store(gum.Unbiased(), RANK, CHOSEN),
    "key": Store(Gaussian(), RANK, ()),
    "keys": Store(Resampled(), RANK, ()),
    "keyed, random": Store(Keyed(), RANK, ("randomized",)),
    "keyed, svd": Store(Keyed(), {**RANK, "proj": "svd"}, CHOSEN),
    "rows": Store(Rows(), RANK, Rows().selections()),
    "sketched rows": Store(SketchedRows(), RANK, Rows().selections()),
    "columns": Store(Columns(), RANK, Columns().selections()),
    "factors": Store(Factors(), {"rank": 3}, ()),
    "none": Store(NoSubspace(), {"rank": None}, ()),
    "blocks": Store(frugal_blocks.Blocks(), {"rank": None}, ()),
}
SCHEDULES = {
    "Schedule": Schedule(),
    "Sampled": Sampled(active_layers=1, steps=1),
    "Sampled, whole": Sampled(WHOLE, TRAINED, active_layers=1, steps=1, shares=True, restarts=True),
    "Sampled, by the gap": Sampled(WHOLE, TRAINED, active_layers=1, period="update_proj_gap", shares=True, restarts=True),
    "Settling": Settling(tau=1e-3, grace=0, period=1),
}
RULES = [
    rules.Adafactor(), rules.Adam(), rules.RatioAdam(), rules.Lion(), rules.Momentum(), rules.NoRule(), rules.Unchanged(),
    rules.Muon(), rules.OneSided(), gum.HeavyBall(), snsm.SubspaceMomentum(), flora.CompressedMomentum(), scale.MatrixMomentum(),
]  # fmt: skip
REMAINDERS = {
    "Remainder": remainder.Remainder(),
    "ScaledGradient": remainder.ScaledGradient(),
    "ScaledResidual": remainder.ScaledResidual(),
    "ScaledResidual, exact": remainder.ScaledResidual(exact=True),
    "StateFree": remainder.StateFree(),
    "StateFree, SGD": remainder.StateFree(sign=False),
    "ErrorFeedback": remainder.ErrorFeedback(),
    "SparseResidual": remainder.SparseResidual(0.1),
    "FactoredRoot": flora.FactoredRoot(),
    "NormalisedRows": gradnormlorp.NormalisedRows(),
    "SubsetNorm": snsm.SubsetNorm(),
    "UnitRms": scale.UnitRms(),
    "Sinkhorn": sinkgd.Sinkhorn(),
    "FactoredMomentum": mofasgd.FactoredMomentum(),
}
WEIGHTS = ("fp32", "bf16", "bf16, stochastic", "int8")


@functools.cache
def matrices(weight):
    """[(name, parameter)] of a wide and a tall one, in two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 10, bias=False))
    model = quantize_model(model) if weight == "int8" else model.to(torch.float32 if weight == "fp32" else torch.bfloat16)
    return list(model.named_parameters())


def tensors(params):
    """What holds their values."""
    return [tensor for _, p in params for tensor in ((p.codes, p.scale) if is_quantized(p) else (p.detach(),))]


def names_of(store, select, schedule, transport, rule, rest):
    """How a message may call the parts of a combination."""
    kind = type(STORES[store].kind)
    return [
        {kind.__name__, *(base.__name__ for base in kind.__mro__ if base.__name__ in ("Gaussian", "Orthonormal"))},
        *([{select}] if select else []), {transport}, {type(SCHEDULES[schedule]).__name__},
        {type(rule).__name__}, {type(REMAINDERS[rest]).__name__},
    ]  # fmt: skip


def trains(store, select, schedule, transport, rule, rest, weight):
    """Whether it does; False where it is refused, for two of its parts."""
    params = matrices(weight)
    keys = {**STORES[store].keys, "moments": transport, **({"subspace": select} if select else {})}
    keys |= {"stochastic_rounding": True} if "stochastic" in weight else {}
    pipeline = Pipeline(rule, subspace=STORES[store].kind, remainder=REMAINDERS[rest], schedule=SCHEDULES[schedule])
    try:
        optimizer = LowRankOptimizer([{"params": params, **keys}], pipeline, {"lr": 0.05, "weight_decay": 0.01})
    except ValueError as error:
        words = set(re.findall(r"[\w-]+", str(error)))
        assert sum(bool(words & names) for names in names_of(store, select, schedule, transport, rule, rest)) >= 2, str(error)
        return False
    before = [tensor.clone() for tensor in tensors(params)]
    try:
        return takes_steps(optimizer, params, before)
    finally:
        optimizer.release()
        for tensor, value in zip(tensors(params), before):
            tensor.copy_(value)


def takes_steps(optimizer, params, before):
    for step in range(2):
        for i, (_, p) in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2 * step + i)).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()
    after = tensors(params)
    assert all(p.isfinite().all() for p in after) and not all(map(torch.equal, before, after))
    for _, p in params:
        for key, value in optimizer.state[p].items():
            assert key == "overlaps" or not isinstance(value, torch.Tensor) or value.isfinite().all(), key
    assert optimizer.skipped() == 0
    return True


PLACES = [(store, select) for store, one in STORES.items() for select in one.selections or (None,)]


@pytest.mark.parametrize("store, select", PLACES, ids=lambda value: str(value))
def test_it_trains_or_says_which_parts_do_not_go_together(store, select, request):
    """With --full beside every transport x rule x remainder; schedules and weights are drawn, each meets each of those often."""
    draw = random.Random(f"{store} {select}")
    others = list(itertools.product(TRANSPORTS, RULES, REMAINDERS))
    if not request.config.getoption("--full"):
        others = draw.sample(others, SAMPLE)
    for transport, rule, rest in others:
        schedule, weight = draw.choice(list(SCHEDULES)), draw.choice(WEIGHTS)
        try:
            trains(store, select, schedule, transport, rule, rest, weight)
        except Exception as error:
            raise AssertionError(f"{store}, {select}, {schedule}, {transport}, {type(rule).__name__}, {rest}, {weight}") from error


USUAL = ("dense", "randomized", "Schedule", "keep", RULES[1], "Remainder", "fp32")
AXES = (STORES, CHOSEN, SCHEDULES, TRANSPORTS, RULES, REMAINDERS, WEIGHTS)
# What a part does not go without.
WITH = {
    "power": {5: "ErrorFeedback"}, "rotate-first": {}, "covariance": {5: "ErrorFeedback"}, "match": {0: "columns", 1: "l1"},
    "whole": {}, "key": {1: None}, "keys": {1: None, 3: "rotate"}, "rows": {1: "top"}, "sketched rows": {1: "top"},
    "columns": {1: "l1"}, "factors": {1: None, 4: RULES[5], 5: "FactoredMomentum"}, "none": {1: None},
    "blocks": {1: None, 5: "StateFree"},
    "FactoredRoot": {4: RULES[11]}, "UnitRms": {0: "none", 1: None}, "Sinkhorn": {0: "none", 1: None, 4: RULES[5]},
    "FactoredMomentum": {0: "factors", 1: None, 4: RULES[5]},
}  # fmt: skip


def title(part):
    return str(part) if isinstance(part, int | str) else type(part).__name__


@pytest.mark.parametrize("axis, part", [(i, part) for i, parts in enumerate(AXES) for part in parts], ids=title)
def test_every_part_trains_beside_those_that_it_needs(axis, part):
    chosen = dict(enumerate(USUAL)) | {axis: part} | WITH.get(part if isinstance(part, str) else "", {})
    assert trains(*(chosen[i] for i in range(7)))
