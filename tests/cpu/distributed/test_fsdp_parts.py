"""What sharded weights meet beside training: clipping, gradients that are not finite, rounding, 8 bits, files, and refusals."""

import argparse
import collections
import functools
import io

import pytest
import torch
import torch.distributed as dist
import world
from sharded import EPS, backward, build, groups, shard, states, train, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lowrank_sys import optim
from lowrank_sys.memory import devices
from lowrank_sys.memory.layout import layout
from lowrank_sys.optim import param_groups
from lowrank_sys.optim.preset import METHODS

SIZE = 4


def galore(model, keys=(), **options):
    return optim.GaLoreAdamW(groups(model, **dict(keys)), lr=1e-2, eps=EPS, **options)


def places(rank, size=SIZE):
    return range(12 * rank // size, 12 * (rank + 1) // size)


def parts(rank):
    return {name: function(rank, SIZE) for name, function in CASES.items()}


@pytest.fixture(scope="module")
def ranks():
    return world.run(SIZE, parts, timeout=300)


def setting(rank, size, keys=(), **options):
    """(model, optimizer), on a rank of many sharded."""
    model = build() if size == 1 else shard(build(), size)
    return model, galore(model, keys, **options)


def clipped(rank, size):
    """Norms as the optimizer and as torch clip them, and the weights."""
    model, optimizer = setting(rank, size, {"refresh": "next"})
    norms = []
    for step in range(6):
        backward(model, step, torch.tensor(places(rank, size)))
        norms.append(float(optimizer.clip_grad_norm_(0.1)))
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        norms.append(float(total.full_tensor() if size > 1 else total))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(norms), weights(model)


def spoiled(rank, size, nonfinite="skip"):
    """Row 3 of a gradient is not finite in steps 1 and 3; 3 is a refresh."""
    model, optimizer = setting(rank, size, nonfinite=nonfinite)
    weight = model[1][0].weight

    def spoil(step):
        if step in (1, 3):
            first, grad = (0, weight.grad) if size == 1 else (24 // size * rank, weight.grad.to_local())
            if first <= 3 < first + len(grad):
                grad[3 - first] = torch.nan

    try:
        train(model, optimizer, range(6), rank, size, spoil)
    except FloatingPointError as error:
        return str(error), weights(model)
    return weights(model), states(optimizer), optimizer.skipped(), optimizer.refreshes()


def raised(rank, size):
    return spoiled(rank, size, "raise")


def scaled(rank, size):
    """With a GradScaler, step 2 of which overflows in one row."""
    model, optimizer = setting(rank, size)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step in range(4):
        backward(model, step, torch.tensor(places(rank, size)), scaler.scale)
        if step == 2 and rank == size - 1:
            grad = model.lm_head.weight.grad
            (grad if size == 1 else grad.to_local())[-1] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return weights(model), torch.tensor(scaler.get_scale())


def give(model, seed):
    """Gradients that all processes know."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else grad


def rounded(rank, size):
    """bf16 weights, rounded stochastically, after two steps on one gradient that all processes know; and fp32 ones."""
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = build(dtype) if size == 1 else shard(build(dtype), size)
        optimizer = galore(model, {"stochastic_rounding": True})
        for step in range(2):
            give(model, step)
            optimizer.step()
        out[dtype] = weights(model)
    return out


def wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(33, 256), nn.Linear(256, 90))
    model.add_module("lm_head", nn.Linear(90, 32))
    return model


def in_8_bits(rank, size):
    """States in 8 bits, and those that other shards took over from them."""
    model = wide() if size == 1 else fully_shard(wide())
    optimizer = optim.GaLoreAdamW8bit(groups(model, rank=80), lr=1e-2, eps=EPS, min_8bit_size=0)
    for step in range(3):
        give(model, step)
        optimizer.step()
    if size == 1:
        return weights(model), optimizer.state_dict()["state"]
    pair = fully_shard(wide(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    other = optim.GaLoreAdamW8bit(groups(pair, rank=80), lr=1e-2, eps=EPS, min_8bit_size=0)
    other.load_state_dict(optimizer.state_dict())
    alone = optim.GaLoreAdamW8bit(groups(wide(), rank=80), min_8bit_size=0)
    alone.load_state_dict(optimizer.state_dict())
    again = optim.GaLoreAdamW8bit(groups(fully_shard(wide()), rank=80), min_8bit_size=0)
    again.load_state_dict(alone.state_dict())
    return weights(model), states(optimizer), states(other), alone.state_dict()["state"], states(again)


def in_files(rank, size):
    """The state as a file holds it, and as a state_dict without DTensors; loaded from both."""
    model, optimizer = setting(rank, size)
    train(model, optimizer, range(3), rank, size)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    out = [states(optimizer), full["state"] if rank == 0 else None]
    for load in (
        lambda other, new: new.load_state_dict(torch.load(file, weights_only=True)),
        lambda other, new: set_optimizer_state_dict(
            other, new, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        ),
    ):
        other, new = setting(rank, size)
        load(other, new)
        out.append(states(new))
    return out


def in_bytes(rank, size):
    model, optimizer = setting(rank, size)
    backward(model, 0, torch.tensor(places(rank, size)))
    optimizer.step()
    return optimizer.memory()


def of_any_shape(rank, size):
    """A convolution in a group with a rank; and a matrix that all processes have as a whole, its basis on the left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Linear(8, 4, bias=False))
    if size > 1:
        fully_shard(model[0])
        mesh = init_device_mesh("cpu", (size,))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.data, mesh, [Replicate()]))
    keys = {"rank": 2, "update_proj_gap": 2}

    def built():
        low = [
            {"params": [model[0].weight], "proj_type": "right", **keys},
            {"params": [model[1].weight], "proj_type": "left", **keys},
        ]
        return optim.GaLoreAdamW(low, lr=1e-2, eps=EPS)

    optimizer = built()
    for step in range(4):
        give(model, step)
        optimizer.step()
        state, optimizer = optimizer.state_dict(), built()
        optimizer.load_state_dict(state)
    assert set(optimizer.refreshes()) == {"parameter 0 of group 0", "parameter 0 of group 1"}
    return weights(model), states(optimizer)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 6, 9, generator=torch.Generator().manual_seed(0)))


def of_experts(rank, size):
    """Of 7 experts, 2, 2, 2 and 1 on a process each, with bases on the left; their state goes through a state_dict at each step."""
    model = Experts() if size == 1 else fully_shard(Experts())

    def built():
        group = {"params": [model.weight], "rank": 2, "update_proj_gap": 3, "refresh": "next", "moments": "rotate"}
        return optim.FiraAdamW([group], lr=1e-2, eps=EPS)

    optimizer, norms = built(), []
    for step in range(5):
        give(model, step)
        norms.append(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        state, optimizer = optimizer.state_dict(), built()
        optimizer.load_state_dict(state)
    whole = optim.FiraAdamW([{**optimizer.param_groups[0], "params": [Experts().weight]}], lr=1e-2, eps=EPS)
    whole.load_state_dict(state)  # of one process
    return weights(model), states(whole), torch.stack(norms), optimizer.refreshes()


class Wire:
    """Counts what the optimizers send: {collective: bytes}."""

    def __init__(self, monkeypatch):
        self.sent = collections.Counter()
        for name in ("all_reduce", "broadcast"):
            monkeypatch.setattr(dist, name, functools.partial(self.send, name, getattr(dist, name)))

    def send(self, name, collective, tensor, **options):
        self.sent[name] += tensor.nbytes
        return collective(tensor, **options)


def sent(rank, size):
    """{method: what each of four steps sends} of a matrix (20, 12) at rank 3, whose basis is new in all of them but the third."""
    out = {}
    for name, (cls, keys) in WIRED.items():
        torch.manual_seed(0)
        layer = fully_shard(nn.Linear(12, 20, bias=False))
        optimizer = cls([{"params": [layer.weight], "rank": 3, "update_proj_gap": 2, **keys}], lr=1e-2)
        out[name] = []
        for step in range(4):
            give(layer, step)
            with pytest.MonkeyPatch.context() as patch:
                wire = Wire(patch)
                optimizer.step()
            out[name].append(dict(wire.sent))
    return out


WIRED = {
    "galore": (optim.GaLoreAdamW, {}),
    "galore from sketches": (optim.GaLoreAdamW, {"refresh": "next"}),
    "frugal": (optim.FrugalAdamW, {}),
    "grass": (optim.GrassAdamW, {}),
    "apollo": (optim.APOLLOAdamW, {}),
    "apollo-mini": (optim.APOLLOAdamW, {**optim.APOLLOAdamW.mini}),
    "fira": (optim.FiraAdamW, {}),
}


def refused(rank, size):
    """What each of these is answered."""
    mesh = init_device_mesh("cpu", (size,))

    def on(placement, *shape):
        return [nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placement]))]

    def keyed(**keys):
        return lambda: galore(shard(build(), size), keys)

    def made(name):
        keys = {"subspace": "randomized", "moments": "keep", "proj_type": "right"} if name == "galore-plus" else {}
        return lambda: METHODS[name].optimizer(param_groups(shard(build(), size), 4, **keys))

    left = optim.GaLoreAdamW(groups(build(), proj_type="left"))
    for param in left.param_groups[1]["params"]:
        param.grad = torch.ones_like(param)
    left.step()
    tries = {
        "left": keyed(proj_type="left"),
        "cross-head": keyed(subspace="cross-head"),
        "per_layer": lambda: galore(shard(build(), size), per_layer="accumulate"),
        **{name: made(name) for name in ("asgo", "owlore", "gum", "galore-plus", "mofasgd")},
        "columns": lambda: optim.GaLoreAdamW([{"params": on(Shard(1), 8, 8), "rank": 2}]),
        "experts": lambda: optim.GaLoreAdamW([{"params": on(Shard(0), 5, 8, 8), "rank": 2}]),
        "captured": lambda: optim.CapturedStep(galore(shard(build(), size))),
        "loaded": lambda: galore(shard(build(), size)).load_state_dict(left.state_dict()),
    }
    answers = {}
    for name, attempt in tries.items():
        with pytest.raises(ValueError) as error:
            attempt()
        answers[name] = str(error.value)
    return answers


ALL = (
    clipped, spoiled, raised, scaled, rounded, in_8_bits,
    in_files, in_bytes, of_any_shape, of_experts, sent, refused,
)  # fmt: skip
CASES = {function.__name__: function for function in ALL}
CLOSE = {"atol": 2e-4, "rtol": 2e-3}


def assert_equal(got, wanted):
    """States, to the bit."""
    assert got.keys() == wanted.keys()
    for i, want in wanted.items():
        assert got[i].keys() == want.keys()
        for key in want:
            assert torch.equal(torch.as_tensor(got[i][key]), torch.as_tensor(want[key])), (i, key)


def test_clipping(ranks):
    wanted = clipped(0, 1)
    for results in ranks:
        torch.testing.assert_close(results["clipped"], wanted, **CLOSE)


def test_a_row_that_is_not_finite_stays_as_it_is(ranks):
    *wanted, skipped, schedule = spoiled(0, 1)
    for results in ranks:
        *got, _, refreshes = results["spoiled"]
        torch.testing.assert_close(got[0], wanted[0], **CLOSE)
        for i, want in wanted[1].items():
            torch.testing.assert_close(got[1][i], want, **CLOSE)
        assert refreshes == schedule
    assert sum(results["spoiled"][2] for results in ranks) == skipped == 2 * 12


def test_all_ranks_raise_for_a_gradient_of_one(ranks):
    message, wanted = raised(0, 1)
    for results in ranks:
        assert results["raised"][0] == message == "the gradient of 1.0.weight is not finite"
        torch.testing.assert_close(results["raised"][1], wanted, **CLOSE)


def test_an_overflow_of_one_rank_is_no_step_on_any(ranks):
    wanted = scaled(0, 1)
    assert wanted[1] == 4.0
    for results in ranks:
        torch.testing.assert_close(results["scaled"], wanted, **CLOSE)


def test_random_bits_are_those_of_the_whole(ranks):
    wanted = rounded(0, 1)
    for results in ranks:
        for dtype, got in results["rounded"].items():
            for name, want in wanted[dtype].items():
                if dtype == torch.float32:
                    torch.testing.assert_close(got[name], want, **CLOSE)
                # products of fewer rows may round otherwise in fp32, which moves one bf16 value in 2^15 or so
                same = (got[name] == want).float().mean()
                assert dtype == torch.float32 or same == 1 or (want.dim() == 2 and same > 0.99), name


def test_shards_hold_the_bytes_of_the_whole(ranks):
    wanted, kept = in_8_bits(0, 1)
    for results in ranks:
        got, state, moved, alone, again = results["in_8_bits"]
        torch.testing.assert_close(got, wanted, atol=1e-2, rtol=0)
        assert_equal(moved, state)
        assert_equal(*({i: moved[i] for i in (0, 4)} for moved in (again, state)))
        for i, want in kept.items():  # of another width there, and as ever here
            assert {k: getattr(v, "dtype", v) for k, v in alone[i].items()} == {k: getattr(v, "dtype", v) for k, v in want.items()}
        coded = []
        for i, want in kept.items():
            for key, value in want.items():
                if key.endswith("_absmax") and key not in state[i]:  # of vectors
                    assert state[i][key.removesuffix("_absmax")].dtype == torch.float32
                elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and i in (0, 4):
                    same = (state[i][key] == value).float().mean()
                    assert same == 1 if i == 0 else same > 0.9, (i, key, same)  # R comes of a product, which may round otherwise
                    coded.append((i, key))
        assert coded == [(i, key) for i in (0, 4) for key in ("exp_avg", "exp_avg_sq")], coded


def test_states_go_through_files(ranks):
    wanted, full, *_ = ranks[0]["in_files"]
    by_number = dict(enumerate(full.values()))
    for results in ranks:
        for state in results["in_files"][2:]:
            assert_equal(state, wanted)
    assert_equal(by_number, wanted)
    _, optimizer = setting(0, 1)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_number})
    assert_equal(states(optimizer), wanted)


def test_convolutions_and_whole_matrices(ranks):
    wanted = of_any_shape(0, 1)
    for results in ranks:
        torch.testing.assert_close(results["of_any_shape"], wanted, **CLOSE)


def test_experts(ranks):
    *wanted, schedule = of_experts(0, 1)
    found = {}
    for results in ranks:
        *got, mine = results["of_experts"]
        torch.testing.assert_close(got, wanted, **CLOSE)
        assert len(mine) in (1, 2) and not mine.keys() & found.keys()
        found |= mine
    assert found == schedule and len(found) == 7


def test_each_rank_holds_its_share(ranks):
    wanted = in_bytes(0, 1)
    for key in ("moments", "weights", "gradients"):
        assert sum(results["in_bytes"][key] for results in ranks) >= wanted[key]
        assert max(results["in_bytes"][key] for results in ranks) < 0.3 * wanted[key]
    assert all(results["in_bytes"]["basis"] == wanted["basis"] for results in ranks)


def test_the_plan_of_several_devices_is_what_they_hold_and_send(ranks):
    model, optimizer = setting(0, 1)
    backward(model, 0, torch.tensor(places(0, 1)))
    optimizer.step()
    plan = layout(model, optimizer)
    for key, share in devices.shares(plan, SIZE).items():
        whole = sum(piece.bytes for piece in (*plan.pieces, *plan.gradients) if piece.category == key)
        assert round(share * whole) == max(results["in_bytes"][key] for results in ranks), key
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=False)
    optimizer = optim.GaLoreAdamW([{"params": [layer.weight], "rank": 3, "update_proj_gap": 2, "proj_type": "right"}], lr=1e-2)
    give(layer, 0)
    optimizer.step()
    args = argparse.Namespace(nproc=SIZE, strategy="fsdp", gradient_accumulation_steps=1)
    sent = ranks[0]["sent"]["galore"][-1]  # a refresh from an old basis
    assert 2 * devices.wire(layout(layer, optimizer), args)["refreshes"] == sum(sent.values())


def test_what_is_not_served_is_refused_when_the_optimizer_is_built(ranks):
    for results in ranks:
        answers = results["refused"]
        assert answers["left"].startswith("proj_type must be right for sharded weights")
        wanted, why = answers["cross-head"].split(": ")
        assert wanted.startswith("subspace must be one of randomized, svd, ") and wanted.endswith("got 'cross-head'")
        assert why == "the rows of a head may lie on several processes"
        assert answers["per_layer"] == "per_layer must be None or 'in_backward' for sharded weights"
        for name, part, word in (
            ("asgo", "OneSided", "Gram"), ("owlore", "Sampled", "frozen"), ("gum", "Sampled", "drawn"),
            ("galore-plus", "SparseResidual", "entries"), ("mofasgd", "Factors", "left side"),
        ):  # fmt: skip
            assert answers[name].startswith(f"{part} does not serve sharded weights: ") and word in answers[name], name
        assert "must have the placement Shard(0)" in answers["columns"] and "Shard(dim=1)" in answers["columns"]
        assert "must have an expert on each of 4 processes" in answers["experts"]
        assert answers["captured"].startswith("optimizer must have whole weights to be captured")
        assert "proj_type='right'" in answers["loaded"]


def test_what_crosses_the_wire(ranks):
    n, r = 12, 3
    l = r + 8  # noqa: E741
    product, basis, norms, gram = 4 * n * l, 4 * n * r, 8 * l, 4 * l * l
    first = {"all_reduce": product, "broadcast": basis}
    warm = {"all_reduce": product + norms + 2 * gram, "broadcast": basis}
    sketch = {"all_reduce": 8 * r + norms + 3 * gram + product, "broadcast": basis}
    wanted = {
        "galore": [first, warm, {}, warm],
        "galore from sketches": [sketch, sketch, {}, sketch],
        "frugal": [first, warm, {}, warm],
        "grass": [{"all_reduce": 8 * n}, {"all_reduce": 8 * n}, {}, {"all_reduce": 8 * n}],
        "apollo": [{"all_reduce": 8}] * 4,
        "apollo-mini": [{"all_reduce": 24}] * 4,
    }
    wanted["fira"] = [{**sent, "all_reduce": sent.get("all_reduce", 0) + 8} for sent in wanted["galore"]]
    for results in ranks:
        assert results["sent"] == wanted
