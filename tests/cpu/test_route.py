"""The general route of a step: what every fused step is held against, and what it may allocate."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_sys.nn import QuantWeight
from lowrank_sys.optim import fused
from lowrank_sys.optim import weight as weights
from lowrank_sys.optim.preset import Preset
from lowrank_sys.optim.remainder import Remainder, ScaledGradient, ScaledResidual, StateFree
from lowrank_sys.optim.rules import Adam, RatioAdam
from lowrank_sys.subspace.keys import Keyed
from lowrank_sys.subspace.orthonormal import Orthonormal
from lowrank_sys.subspace.rows import Rows

M, N, RANK, CHANNEL = 72, 80, 8, 5
CODED_RANK = 64  # 8-bit moments need rows as long
REMAINDERS = {part.name: part for part in (Remainder(), ScaledGradient(), ScaledResidual(), StateFree())}


def optimizer_of(row, params, **options):
    """An optimizer whose parts are those of a row of the table."""
    weight, basis, moments, rule, remainder = row

    class Parts(Preset):
        subspace = Keyed() if basis == "key" else Rows() if basis == "rows" else Orthonormal()

    Parts.rule, Parts.remainder = Adam() if rule == "adam" else RatioAdam(), REMAINDERS[remainder]
    keys = {"quant": True} if basis == "int4" else {}
    keys |= {"min_8bit_size": 0} if moments == "8bit" else {}
    return Parts([{"params": params, **keys, **options}], lr=0.01, weight_decay=0.1, bits=8 if moments == "8bit" else 32)


CASES = [
    pytest.param(row, dtype, side, id="-".join(map(str, (*row, str(dtype)[6:], side))))
    for row in fused.FUSED
    for dtype in ((torch.float32, torch.bfloat16) if row[0] == "float" else (torch.float32,))
    for side in (("left", "right") if row[1] else ("left",))
]


def rank_of(row):
    return CODED_RANK if row[2] == "8bit" else RANK


def made(row, dtype, side, shape=(M, N)):
    """(optimizer, parameter) after two steps, whose basis is due in none of the next."""
    torch.manual_seed(0)
    if row[0] == "int8":
        param = QuantWeight(*torch.ops.lowrank.quantize_int8(torch.randn(shape), group_size=32), group_size=32)
    else:
        param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    low_rank = {"rank": rank_of(row), "proj_type": side, "update_proj_gap": 1000} if row[1] else {}
    optimizer = optimizer_of(row, [param], **low_rank)
    for _ in range(2):
        step(optimizer, param, gradient(param, dtype))
    return optimizer, param


def gradient(param, dtype):
    return torch.randn(tuple(param.shape)).to(dtype)


def step(optimizer, param, g, projected=False, found_inf=None, grad_scale=None):
    """A step by its pipeline; grad_scale as a GradScaler's."""
    (group,) = optimizer.param_groups
    with torch.no_grad():
        for batch in optimizer.batches(group, [(param, g)], grad_scale, found_inf, projected):
            lr = optimizer.rate(group)
            if projected:
                optimizer.pipeline.update(batch, lr)
            else:
                optimizer.pipeline.step(batch, lr)


def values(optimizer, param):
    """{name: tensor} of all that a step writes, copies."""
    tensors = {"codes": param.codes, "scale": param.scale} if weights.weight_store(param).int8 else {"weight": param.detach()}
    state = {key: value for key, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
    return {key: value.clone() for key, value in (tensors | state).items()}


def both(row, dtype, side, monkeypatch, **options):
    """(before, after the fused step, after the general one, skipped by each)."""
    optimizer, param = made(row, dtype, side)
    state = optimizer.state[param]
    assert fused.names_of(param, state, optimizer.pipeline.rule_of(optimizer.param_groups[0]),
                          optimizer.pipeline.remainder_of(optimizer.param_groups[0], state)) == row  # fmt: skip
    torch.manual_seed(1)
    g = gradient(param, dtype)
    g[(slice(None), CHANNEL) if side == "left" else CHANNEL] = torch.nan
    if options.get("projected"):
        g = optimizer.pipeline.subspace.project(optimizer.param_groups[0], g, state)
    other, twin = copy.deepcopy((optimizer, param))
    before, skipped = values(optimizer, param), optimizer.skipped()
    called = []
    monkeypatch.setattr(fused, "run", lambda *a, run=fused.run: called.append(1) or run(*a))
    step(optimizer, param, g, **options)
    assert called == [1]
    monkeypatch.setattr(fused, "fused", lambda batch: None)
    step(other, twin, g, **options)
    assert called == [1]
    return before, values(optimizer, param), values(other, twin), (optimizer.skipped() - skipped, other.skipped() - skipped)


def assert_alike(got, want):
    """Equal within rounding; codes are neighbours, but for few the same."""
    assert got.keys() == want.keys()
    for name, a in got.items():
        b = want[name]
        if a.dtype in (torch.uint8, torch.int8):
            off = (a.int() - b.int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() <= 0.01, name
        else:
            tolerance = 2**-7 if a.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("row, dtype, side", CASES)
def test_the_general_route_is_the_fused_step(row, dtype, side, monkeypatch):
    scale = torch.tensor([4.0])
    before, got, want, skipped = both(row, dtype, side, monkeypatch, grad_scale=scale, found_inf=torch.tensor([0.0]))
    assert_alike(got, want)
    weight = "codes" if row[0] == "int8" else "weight"
    assert not torch.equal(before[weight], got[weight])
    assert skipped[0] == skipped[1] == (M if side == "left" else N)


@pytest.mark.parametrize("row, dtype, side", CASES)
def test_neither_writes_where_found_inf_is_set(row, dtype, side, monkeypatch):
    before, got, want, skipped = both(row, dtype, side, monkeypatch, found_inf=torch.tensor([1.0]))
    waits = {"countdown"}  # the schedule goes on
    for name in before.keys() - waits:
        assert torch.equal(before[name], got[name]) and torch.equal(before[name], want[name]), name
    assert skipped == (0, 0)


@pytest.mark.parametrize(
    "row, dtype, side", [case for case in CASES if case.values[0][1] not in (None, "rows") and case.values[0][4] == "none"]
)
def test_from_a_low_rank_gradient_too(row, dtype, side, monkeypatch):
    _, got, want, skipped = both(row, dtype, side, monkeypatch, projected=True)
    assert_alike(got, want)
    assert skipped[0] == skipped[1] == (M if side == "left" else N)


class Largest(TorchDispatchMode):
    """The most bytes of a storage that an operator makes."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("row, dtype, side", [case for case in CASES if case.values[0][1] is not None])
def test_nothing_of_the_weights_size_is_made(row, dtype, side, monkeypatch):
    m, n = 512, 384
    optimizer, param = made(row, dtype, side, (m, n))
    g = gradient(param, dtype)
    monkeypatch.setattr(fused, "fused", lambda batch: None)
    monkeypatch.setattr(weights, "PANEL", 4 * 32 * n)
    tensors = [param.codes, param.scale] if row[0] == "int8" else [param.detach()]
    known = [g, *tensors, *(value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))]
    with Largest(known) as largest:
        step(optimizer, param, g)
    panel, low_rank = 4 * 32 * n, 4 * rank_of(row) * max(m, n)
    assert 0 < largest.bytes <= max(panel, 2 * low_rank)
