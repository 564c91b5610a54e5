"""Stochastic rounding of weights in 16 bits: unbiased, exact in what it draws, and off unless a group asks for it."""

import copy
import warnings

import pytest
import torch
from threads import threads

from lowrank_sys import optim, reference
from lowrank_sys.optim import fused
from lowrank_sys.optim.weight import weight_store

ops = torch.ops.lowrank
HALVES = (torch.bfloat16, torch.float16)
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.125)
STREAM = dict(seed=-3, step=torch.tensor(7), parameter=5)


def round_(values, dtype, **stream):
    out = torch.zeros(values.shape, dtype=dtype)
    ops.round_stochastic_(out, values, **{**STREAM, **stream})
    return out


def neighbours(values, dtype):
    """The numbers of a dtype on both sides of values, towards zero and away, in fp64."""
    nearest = values.to(dtype)
    bits = nearest.view(torch.int16).int()
    bits = torch.where(nearest.double().abs() > values.double().abs(), bits - 1, bits)
    up = torch.where(bits.to(torch.int16).view(dtype).double() == values.double(), bits, bits + 1)
    return bits.to(torch.int16).view(dtype).double(), up.to(torch.int16).view(dtype).double()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 2.0**-15, 2.0**-22, 3e4])
def test_unbiased(dtype, size):
    torch.manual_seed(0)
    count, draws = 128, 4000
    values = torch.randn(count) * size if size < 1e4 else size * (1 + torch.rand(count))
    down, up = neighbours(values, dtype)
    drawn = round_(values.repeat(draws, 1), dtype).double()
    assert ((drawn == down) | (drawn == up)).all()
    p = (values.double() - down) / torch.where(up == down, 1, up - down)
    ups = (drawn == up).double().mean(0).where(up != down, p)
    sigma = (p * (1 - p) / draws).sqrt().clamp(min=1e-9)
    off = (ups - p).abs()
    assert (off <= 5 * sigma + 2.0**-17).all()
    assert abs(((ups - p) / sigma)[(p > 0.01) & (p < 0.99)].mean()) < 5 / count**0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_dtype_holds_stays_and_what_it_does_not_is_as_to_nearest(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    got = round_(every.float(), dtype)
    number = ~every.isnan()
    assert torch.equal(got.view(torch.int16)[number], every.view(torch.int16)[number])
    assert got[~number].isnan().all()
    most = torch.finfo(dtype).max
    beyond = torch.tensor([most, most * (1 + 2.0**-13), most * 1.01, -most * 1.01, torch.inf, -torch.inf]).clamp(-3.4e38, 3.4e38)
    beyond[-2:] = torch.tensor([torch.inf, -torch.inf])
    for step in range(20):
        assert torch.equal(round_(beyond, dtype, step=torch.tensor(step)), beyond.to(dtype))


def test_fp32_takes_values_as_they_are():
    values = torch.randn(33)
    assert torch.equal(round_(values, torch.float32), values)


@pytest.mark.parametrize("dtype", HALVES)
def test_bits_are_those_of_the_element(dtype):
    values = torch.randn(50, 37)
    whole = round_(values, dtype)
    for first, end in ((0, 7), (7, 32), (32, 50)):
        assert torch.equal(round_(values[first:end].contiguous(), dtype, offset=first * 37), whole[first:end])
    for other in (dict(seed=4), dict(step=torch.tensor(8)), dict(parameter=6), dict(offset=1)):
        assert not torch.equal(round_(values, dtype, **other), whole)
    assert torch.equal(round_(values, dtype, step=torch.tensor(7.0 + 2**32, dtype=torch.float64)), whole)


def adamw_lists(dtype, grad_dtype=torch.float32, shape=(67, 45)):
    torch.manual_seed(1)
    return [
        [torch.randn(shape).to(dtype)],
        [torch.randn(shape).to(grad_dtype)],
        [torch.randn(shape)],
        [torch.rand(shape)],
        [torch.tensor(3.0)],
    ]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_the_oracle_to_the_bit(dtype, grad_dtype):
    lists = adamw_lists(dtype, grad_dtype)
    lists[1][0][3, 4] = torch.nan
    want = copy.deepcopy(lists)
    hyper = dict(lr=torch.tensor(0.01, dtype=torch.float64), **ADAM, stochastic=True, seed=9, parameters=[2], offsets=[11])
    ops.adamw_step(*lists, **hyper)
    reference.adamw_step(*want, **hyper)
    assert torch.equal(lists[0][0], want[0][0])
    assert torch.equal(lists[2][0], want[2][0])


@pytest.mark.parametrize("stochastic", [False, True])
def test_threads_draw_the_same(stochastic):
    results = []
    for count in (1, 2, 3):
        lists = adamw_lists(torch.bfloat16, shape=(700, 301))
        with threads(count):
            ops.adamw_step(
                *lists, lr=torch.tensor(0.01), **ADAM, stochastic=stochastic, seed=9, parameters=[2] if stochastic else []
            )
        results.append(lists[0][0])
    assert all(torch.equal(results[0], other) for other in results[1:])


# Every policy that writes float weights.
POLICIES = [
    ("dense", "fp32", "none"),
    ("int4", "fp32", "none"),
    ("dense", "8bit", "none"),
    ("dense", "fp32", "scaled-gradient"),
    ("key", "fp32", "scaled-gradient"),
    ("dense", "fp32", "scaled-residual"),
    ("dense", "fp32", "state-free"),
]


def step_arguments(policy, dtype, left, zero=False, shape=(70, 52), **options):
    """(lists, keywords) of a step of one matrix; zero: with a gradient and first moments of zeros."""
    basis, moments, remainder = policy
    torch.manual_seed(2)
    (m, n), r = shape, 5
    d, low_rank = (m, (r, n)) if left else (n, (m, r))
    factor = 0.0 if zero else 1.0
    bases, parts = [torch.linalg.qr(torch.randn(d, r))[0].contiguous()], []
    if basis == "int4":
        bases, *parts = ([x] for x in ops.quantize_int4(bases[0]))
    elif basis == "key":
        bases = [torch.tensor([1, 2, 3, 0])]
    states = [factor * torch.randn(low_rank), torch.rand(low_rank) + 0.1]
    if moments == "8bit":
        coded = [ops.quantize_blockwise(x, signed=signed, by_row=True) for x, signed in zip(states, (True, False))]
        states = [x for pair in zip(*coded) for x in pair]
    weight = torch.randn(m, n).to(dtype)
    gradient = factor * torch.randn(m, n)
    lists = ([weight], [], [gradient], bases, [x for part in parts for x in part], states, [torch.tensor(3.0)])
    rule = "ratio-adam" if remainder.startswith("scaled") else "adam"
    keys = dict(weight="float", basis=basis, moments=moments, rule=rule, remainder=remainder, scale=0.25, left=left)
    hyper = {**ADAM, **keys, "stochastic": True, "seed": 4, "parameters": [8], "sign": remainder == "state-free", **options}
    return lists, {"lr": torch.tensor(0.01, dtype=torch.float64), **hyper}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_a_step_draws_as_the_oracle(policy, dtype, left):
    lists, hyper = step_arguments(policy, dtype, left, offsets=[13])
    want, nearest = copy.deepcopy(lists), copy.deepcopy(lists)
    ops.step(*lists, **hyper)
    reference.step(*want, **hyper)
    got, other = lists[0][0], want[0][0]
    assert (got == other).double().mean() >= 0.99  # R may differ in its last bit, which the draw then sees
    place = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), other.float(), rtol=place, atol=2.0**-24)
    ops.step(*nearest, **hyper | {"stochastic": False})
    assert (got == nearest[0][0]).double().mean() < 0.9


def test_int8_products_draw_as_the_oracle():
    for left in (True, False):
        lists, hyper = step_arguments(POLICIES[0], torch.bfloat16, left, int8_gemm=True)
        want = copy.deepcopy(lists)
        ops.step(*lists, **hyper)
        reference.step(*want, **hyper)
        assert (lists[0][0] == want[0][0]).double().mean() >= 0.99


@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_zero_update_leaves_the_bytes(policy, dtype):
    lists, hyper = step_arguments(policy, dtype, True, zero=True, weight_decay=0.0)
    before = lists[0][0].clone()
    ops.step(*lists, **hyper)
    assert torch.equal(lists[0][0].view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("policy", POLICIES, ids="-".join)
def test_channels_that_are_left_out_keep_their_bytes(policy):
    lists, hyper = step_arguments(policy, torch.bfloat16, True)
    lists[2][0][4, 9] = torch.inf
    before, skipped = lists[0][0].clone(), torch.tensor(0)
    ops.step(*lists, **hyper, skipped=skipped)
    assert torch.equal(lists[0][0][:, 9], before[:, 9]) and skipped == 70
    assert not torch.equal(lists[0][0], before)


def test_a_large_matrix_in_tiles_is_one_of_rows():
    """Tiles of a step do not change what it draws: its shards by rows are the whole's."""
    lists, hyper = step_arguments(POLICIES[3], torch.bfloat16, False, shape=(1100, 1030), parameters=[3], weight_decay=10.0)
    top, rest = copy.deepcopy(lists), copy.deepcopy(lists)
    for shard, rows in ((top, slice(0, 600)), (rest, slice(600, 1100))):
        for i in (0, 2, 5):
            shard[i][:] = [x[rows].contiguous() if x.shape[:1] == (1100,) else x for x in shard[i]]
    ops.step(*lists, **hyper)
    ops.step(*top, **hyper)
    ops.step(*rest, **hyper, offsets=[600 * 1030])
    assert (torch.cat([top[0][0], rest[0][0]]) == lists[0][0]).double().mean() >= 0.9999


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.125])
def test_selected_rows_draw_as_the_oracle(left, weight_decay):
    torch.manual_seed(3)
    shape = (90, 300)
    indices = torch.randperm(shape[0 if left else 1])[:7].int()
    low_rank = (7, shape[1]) if left else (shape[0], 7)
    lists = [
        [torch.randn(shape).bfloat16()], [torch.randn(shape)], [indices], [], [torch.randn(low_rank)], [torch.rand(low_rank)],
        [torch.tensor(2.0)],
    ]  # fmt: skip
    want, before = copy.deepcopy(lists), lists[0][0].clone()
    hyper = {**ADAM, "weight_decay": weight_decay, "scale": 0.25, "left": left, "stochastic": True, "seed": 1, "parameters": [4]}
    hyper["lr"] = torch.tensor(0.01, dtype=torch.float64)
    ops.step.rows(*lists, **hyper)
    reference.rows_step(*want, **hyper)
    assert torch.equal(lists[0][0], want[0][0])
    others = torch.ones(shape[0 if left else 1], dtype=torch.bool).index_fill(0, indices.long(), False)
    same = (lists[0][0] == before)[others] if left else (lists[0][0] == before)[:, others]
    assert same.all() == (weight_decay == 0)


def test_adam_in_8_bits_draws_as_the_oracle():
    params, grads, *_, steps = adamw_lists(torch.bfloat16, shape=(300, 41))
    coded = [ops.quantize_blockwise(torch.randn(300, 41).abs(), signed=signed) for signed in (True, False)]
    lists = [params, grads, *([x] for pair in zip(*coded) for x in pair), steps]
    want = copy.deepcopy(lists)
    hyper = dict(lr=torch.tensor(0.01, dtype=torch.float64), **ADAM, stochastic=True, seed=9, parameters=[2], offsets=[3])
    ops.adam_8bit_(*lists, **hyper)
    reference.adam_8bit_(*want, **hyper)
    assert torch.equal(lists[0][0], want[0][0])


def test_numbers_of_the_weights_are_checked():
    lists = adamw_lists(torch.bfloat16)
    hyper = dict(lr=torch.tensor(0.01), **ADAM, stochastic=True)
    with pytest.raises(RuntimeError, match="adamw_step: parameters must have 1 numbers, one a weight, got 0"):
        ops.adamw_step(*lists, **hyper)
    with pytest.raises(RuntimeError, match="adamw_step: offset must be at least 0, got -1"):
        ops.adamw_step(*lists, **hyper, parameters=[0], offsets=[-1])
    lists, hyper = step_arguments(POLICIES[0], torch.bfloat16, True, parameters=[])
    with pytest.raises(RuntimeError, match="step: parameters must have 1 numbers, one a weight, got 0"):
        ops.step(*lists, **hyper)


# Optimizers.

RUNS = {
    "plain": (optim.GaLoreAdamW, {}),
    "galore": (optim.GaLoreAdamW, {"rank": 4}),
    "galore8bit": (optim.GaLoreAdamW8bit, {"rank": 64, "min_8bit_size": 0}),
    "apollo": (optim.APOLLOAdamW, {"rank": 4}),
    "fira": (optim.FiraAdamW, {"rank": 4}),
    "grass": (optim.GrassAdamW, {"rank": 4}),
    "adafactor": (optim.GaLoreAdafactor, {"rank": 4}),
    "plain adafactor": (optim.GaLoreAdafactor, {}),
}


def made(name, dtype=torch.bfloat16, lr=0.01, weight_decay=0.0, **keys):
    cls, own = RUNS[name]
    torch.manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(80, 72).to(dtype)) for _ in range(2)]
    group = {"params": params, "stochastic_rounding": True, **own, **keys}
    absolute = {"relative_step": False, "scale_parameter": False} if cls is optim.GaLoreAdafactor else {}
    return cls([group], lr=lr, weight_decay=weight_decay, **absolute), params


def take(optimizer, params, steps=1, scale=1.0, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = (scale * torch.randn(p.shape)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", ["plain", "galore", "adafactor"])
def test_decay_below_half_a_place_counts_in_the_mean(name):
    (on, moved), (off, still) = (
        made(name, lr=1e-3, weight_decay=0.1, stochastic_rounding=stochastic) for stochastic in (True, False)
    )
    first = still[0].detach().clone()
    for _ in range(1000):
        take(on, moved[:1], scale=0.0)
    take(off, still[:1], scale=0.0, steps=20)
    assert torch.equal(still[0], first)
    wanted = (1 - 1e-4) ** 1000
    kept = (moved[0].double() * first.double()).sum() / first.double().square().sum()
    # 1,000 draws of a place or nothing a weight, and normal weights w count as w²: a factor of 3.
    n, place = first.numel(), 2.0**-7
    sigma = (place * 1000 * 1e-4 * 3 / n) ** 0.5
    assert abs(kept - wanted) < 5 * sigma
    assert wanted + 10 * sigma < 1


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(name):
    optimizer, params = made(name)
    take(optimizer, params, steps=3)
    other, twins = made(name)
    for twin, p in zip(twins, params):
        twin.data.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, mine in ((optimizer, params), (other, twins)):
        take(one, mine, steps=3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(params, twins))


@pytest.mark.parametrize("name", ["plain", "galore", "apollo", "grass", "fira"])
def test_the_general_route_draws_the_same(name, monkeypatch):
    (one, params), (other, twins) = made(name), made(name)
    take(one, params)
    monkeypatch.setattr(fused, "fused", lambda batch: None)
    take(other, twins)
    for a, b in zip(params, twins):
        assert (a == b).double().mean() >= 0.99
        torch.testing.assert_close(a.float(), b.float(), rtol=2.0**-7, atol=0)


def test_the_general_route_writes_weights_of_any_layout():
    torch.manual_seed(0)
    values = torch.randn(6, 4, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(values.bfloat16().to(memory_format=layout))
        optimizer = optim.GaLoreAdafactor([{"params": [p], "stochastic_rounding": True}], lr=0.01, relative_step=False)
        p.grad = values.bfloat16()
        optimizer.step()
        results.append(p.detach().contiguous())
    assert torch.equal(*results)
    assert not torch.equal(results[0], values.bfloat16())


def test_weights_draw_bits_of_their_own():
    for name in ("plain", "galore"):
        optimizer, params = made(name)
        numbers = [optimizer.state_of(p)["parameter"] for p in params]
        assert len(set(numbers)) == 2
    low, plain = (torch.nn.Parameter(torch.randn(8, 8).bfloat16()) for _ in range(2))
    optimizer = optim.GaLoreAdamW(
        [{"params": [plain], "stochastic_rounding": True}, {"params": [low], "rank": 2, "stochastic_rounding": True}]
    )
    assert [optimizer.state_of(p)["parameter"] for p in (low, plain)] == [0, 2**31]


@pytest.mark.parametrize("name", ["plain", "galore"])
def test_fp32_weights_are_as_without(name):
    (on, params), (off, others) = (made(name, torch.float32, stochastic_rounding=stochastic) for stochastic in (True, False))
    take(on, params, steps=3)
    take(off, others, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(params, others))


def test_off_keeps_nothing():
    optimizer, params = made("galore", stochastic_rounding=False)
    take(optimizer, params)
    assert "parameter" not in optimizer.state[params[0]]
    assert not weight_store(params[0], optimizer.param_groups[0]).stochastic


@pytest.mark.parametrize("name", ["plain", "galore"])
def test_a_state_of_a_version_without_the_key_goes_on_with_it(name):
    old, params = made(name, stochastic_rounding=False)
    take(old, params)
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["stochastic_rounding"]
    new, twins = made(name)
    new.load_state_dict(saved)
    assert new.param_groups[0]["stochastic_rounding"]
    assert [new.state[p]["parameter"] for p in twins] == [2**31, 2**31 + 1] if name == "plain" else [0, 1]
    assert all("parameter" not in state for state in saved["state"].values())
    take(new, twins)
    plain, _ = made(name, stochastic_rounding=False)
    plain.load_state_dict(saved)
    assert not plain.param_groups[0]["stochastic_rounding"]


def test_a_saved_key_is_loaded_as_any_other():
    on, params = made("galore")
    take(on, params)
    off, twins = made("galore", stochastic_rounding=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off.load_state_dict(on.state_dict())
    assert off.param_groups[0]["stochastic_rounding"]
    take(off, twins)


def test_switched_on_in_the_middle_it_is_refused():
    optimizer, params = made("galore", stochastic_rounding=False)
    take(optimizer, params)
    optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(ValueError, match="stochastic_rounding must be set before a group's first step"):
        take(optimizer, params)


def test_the_key_is_a_flag():
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False, got 'yes'"):
        made("galore", stochastic_rounding="yes")


def test_param_groups_gives_it_to_all():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)).bfloat16()
    plain, low = optim.param_groups(model, rank=2, stochastic_rounding=True, seed=7)
    assert plain["stochastic_rounding"] and low["stochastic_rounding"] and plain["seed"] == low["seed"] == 7
    assert "stochastic_rounding" not in optim.param_groups(model, rank=2)[0]
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False, got 1"):
        optim.param_groups(model, rank=2, stochastic_rounding=1)
    optimizer = optim.GaLoreAdamW(optim.param_groups(model, rank=2, stochastic_rounding=True), lr=1e-2, per_layer="accumulate")
    before = copy.deepcopy(model)
    model(torch.randn(4, 16).bfloat16()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0].weight)
    assert optimizer.state[model[0].weight]["parameter"] == 0
