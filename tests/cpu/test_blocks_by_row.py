"""8-bit moments of low-rank gradients in blocks of one row: shards of rows, states with flat blocks, rows too short for codes."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lowrank_sys import backends, optim

ops = torch.ops.lowrank
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8)
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
KEYS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def same(a, b):
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def stored(shape):
    draw = torch.Generator().manual_seed(0)
    (m, m_absmax), (v, v_absmax) = (
        ops.quantize_blockwise(x, signed=signed, by_row=True)
        for x, signed in ((torch.randn(shape, generator=draw), True), (torch.rand(shape, generator=draw), False))
    )
    return [m, v, m_absmax, v_absmax]


# Shards


@SIDES
@pytest.mark.parametrize("columns", [64, 100, 256, 515])
def test_shards_of_rows_are_the_whole(columns, left):
    """Three steps on rows by themselves: the bytes of three steps on all of R, right with a row that is left out."""
    rows, cuts = 23, (7, 0, 1, 15)
    whole = stored((rows, columns))
    shards = [[x.clone() for x in part] for part in zip(*(x.split(cuts) for x in whole))]
    for step in range(1, 4):
        r = torch.randn(rows, columns, generator=torch.Generator().manual_seed(step))
        if not left:
            r[9, 5] = torch.nan
        update, parts = torch.empty_like(r), [torch.empty_like(part) for part in r.split(cuts)]
        count = torch.tensor(float(step))
        ops.adam_8bit_low_rank_([r], [update], *([x] for x in whole), [count], left=left, **HYPER)
        ops.adam_8bit_low_rank_(
            [part.clone() for part in r.split(cuts)], parts, *map(list, zip(*shards)), [count] * len(cuts), left=left, **HYPER
        )
        assert same(torch.cat(parts), update)
    assert all(same(torch.cat(parts), x) for parts, x in zip(zip(*shards), whole))


def steps_from(optimizer, param, low_rank_grads):
    """Steps of the optimizer's own route from gradients that are projected already."""
    (group,) = optimizer.param_groups
    for r in low_rank_grads:
        with torch.no_grad():
            for batch in optimizer.batches(group, [(param, r)], projected=True):
                optimizer.pipeline.update(batch, optimizer.rate(group))


def test_a_state_that_is_split_by_rows_goes_on_as_the_whole():
    """A right basis of 72 columns: each shard has rows of W, of both moments and of their scales, and the whole basis."""
    rows, n, rank, cut = 160, 80, 72, 75
    param = nn.Parameter(torch.randn(rows, n))
    keys = {"rank": rank, "proj_type": "right", "update_proj_gap": 100}
    optimizer = optim.GaLoreAdamW8bit([{"params": [param], **keys}], lr=0.01, min_8bit_size=0)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_absmax"].shape == (rows, 1)
    saved, before = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    r = torch.randn(3, rows, rank)
    steps_from(optimizer, param, r)
    for part in (slice(0, cut), slice(cut, rows)):
        shard = nn.Parameter(before[part].clone())
        other = optim.GaLoreAdamW8bit([{"params": [shard], **keys}], lr=0.01, min_8bit_size=0)
        state = copy.deepcopy(saved["state"][0])
        state |= {key: state[key][part].clone() for key in KEYS}
        other.load_state_dict({**saved, "state": {0: state}})
        steps_from(other, shard, r[:, part])
        assert all(same(other.state[shard][key], optimizer.state[param][key][part]) for key in KEYS)
        torch.testing.assert_close(shard, param[part], rtol=0, atol=1e-6)  # behind a GEMM


# States with flat blocks


class Model(nn.Module):
    """Low-rank gradients of (4, 300), (4, 512), (100, 4) and three times (4, 300), and a plain weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"odd": (100, 300), "even": (100, 512), "short": (100, 90), "experts": (3, 100, 300), "plain": (60, 70)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def optimizer(self):
        low_rank = [self.odd, self.even, self.short, self.experts]
        groups = [{"params": low_rank, "rank": 4}, {"params": [self.plain]}]
        return optim.GaLoreAdamW8bit(groups, lr=0.01, min_8bit_size=0)


def train(model, optimizer, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=draw)
        optimizer.step()


def trained():
    model = Model()
    optimizer = model.optimizer()
    train(model, optimizer, range(3))
    return model, optimizer


def with_flat_blocks(state_dict):
    """A state as older versions keep it: the moments of every low-rank gradient in blocks flat over it."""
    state_dict = copy.deepcopy(state_dict)
    for i in state_dict["param_groups"][0]["params"]:
        state = state_dict["state"][i]
        for name, signed in MOMENTS.items():
            values = state[name]
            if values.dtype == torch.uint8:
                values = ops.dequantize_blockwise(values, state[f"{name}_absmax"], signed=signed)
            made = [ops.quantize_blockwise(x.clone(), signed=signed) for x in (values if values.dim() == 3 else [values])]
            codes, absmax = (torch.stack(column) if values.dim() == 3 else column[0] for column in zip(*made))
            state[name], state[f"{name}_absmax"] = codes, absmax
    return state_dict


def loaded(state_dict):
    """(model, optimizer, warnings) of a fresh pair that takes up a state."""
    model = Model()
    optimizer = model.optimizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state_dict)
    return model, optimizer, [str(warning.message) for warning in caught]


def test_flat_blocks_are_encoded_again_once_and_it_is_said():
    old = with_flat_blocks(trained()[1].state_dict())
    kept = copy.deepcopy(old)
    model, optimizer, said = loaded(old)
    assert len(said) == 1 and said[0].startswith("6 8-bit moments of the loaded state are in blocks that cross rows")
    for i, name in enumerate(("odd", "even", "short", "experts", "plain")):
        state, then = optimizer.state[getattr(model, name)], old["state"][i]
        for key, signed in MOMENTS.items():
            codes, absmax = then[key], then[f"{key}_absmax"]
            if name in ("even", "plain"):  # whole blocks fill the rows: the same bytes
                assert same(state[key], codes) and same(state[f"{key}_absmax"].flatten(), absmax)
                continue
            each = zip(codes, absmax) if name == "experts" else [(codes, absmax)]
            values = [ops.dequantize_blockwise(*one, signed=signed) for one in each]
            values = torch.stack(values) if name == "experts" else values[0]
            if name == "short":
                assert same(state[key], values) and f"{key}_absmax" not in state
            else:
                want = ops.quantize_blockwise(values, signed=signed, by_row=True)
                assert same(state[key], want[0]) and same(state[f"{key}_absmax"], want[1])
    for i, state in kept["state"].items():  # what was handed over stays as it was
        assert all(same(state[key], old["state"][i][key]) for key in KEYS if key in state)


def test_what_was_encoded_again_goes_on_to_the_bit():
    model, optimizer, _ = loaded(with_flat_blocks(trained()[1].state_dict()))
    again, other, said = loaded(copy.deepcopy(optimizer.state_dict()))
    assert not said
    train(model, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    assert all(same(a, b) for a, b in zip(model.parameters(), again.parameters()))
    for a, b in zip(model.parameters(), again.parameters()):
        assert all(same(optimizer.state[a][key], other.state[b][key]) for key in KEYS if key in optimizer.state[a])


def test_a_state_by_row_is_loaded_silently():
    _, optimizer = trained()
    _, other, said = loaded(optimizer.state_dict())
    assert not said
    for a, b in zip(optimizer.state.values(), other.state.values()):
        assert all(same(a[key], b[key]) for key in KEYS if key in a)


@pytest.mark.parametrize("cls", [optim.GaLoreAdamW, optim.GaLoreAdamW8bit])
def test_scales_that_fit_neither_are_refused(cls):
    old = with_flat_blocks(trained()[1].state_dict())
    model = Model()
    options = {} if cls is optim.GaLoreAdamW else {"min_8bit_size": 0}
    other = cls([{"params": [model.odd, model.even, model.short, model.experts], "rank": 4}, {"params": [model.plain]}], **options)
    if cls is optim.GaLoreAdamW8bit:
        old["state"][0]["exp_avg_absmax"] = torch.zeros(6)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="exp_avg"):
        warnings.simplefilter("ignore")
        other.load_state_dict(old)
    assert not other.state


# Rows that are too short for codes


@pytest.mark.parametrize("cls", [optim.GaLoreAdamW8bit, optim.QGaLoreAdamW8bit])
@pytest.mark.parametrize(
    "shape, rank, side, coded",
    [
        ((200, 63), 4, "left", False),
        ((200, 64), 4, "left", True),
        ((63, 200), 4, "left", True),
        ((200, 90), 63, "right", False),
        ((200, 90), 64, "right", True),
        ((3, 200, 300), 4, "left", True),
        ((3, 200, 300), 4, "right", False),
    ],
)
def test_rows_under_64_keep_fp32(shape, rank, side, coded, cls):
    param = nn.Parameter(torch.randn(shape))
    optimizer = cls([{"params": [param], "rank": rank, "proj_type": side}], lr=0.01, min_8bit_size=0)
    param.grad = torch.randn_like(param)
    optimizer.step()
    state, (*experts, m, n) = optimizer.state[param], shape
    low_rank = (rank, n) if side == "left" else (m, rank)
    for name in MOMENTS:
        assert state[name].shape == (*experts, *low_rank) and state[name].any()
        assert state[name].dtype == (torch.uint8 if coded else torch.float32) and (f"{name}_absmax" in state) == coded
        if coded:
            assert state[f"{name}_absmax"].shape == (*experts, low_rank[0], -(-low_rank[1] // 256))


def test_plain_groups_stay_flat():
    param = nn.Parameter(torch.randn(200, 30))
    optimizer = optim.GaLoreAdamW8bit([{"params": [param]}], lr=0.01)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8 and optimizer.state[param]["exp_avg_absmax"].shape == (24,)
