"""INT8 weights sharded by fully_shard: gathered as codes, trained as in one process, and saved for any number of processes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import world
from sharded import EPS, VOCAB, groups, states, train, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from lowrank_sys import optim
from lowrank_sys.memory.layout import layout
from lowrank_sys.nn import QuantLinear, dequantize_model, is_quantized, quantize_model, shardable

SIZE, GROUP, STEPS = 4, 32, 6


def build(dtype=torch.float32):
    """Of the 5 rows of one matrix 4 ranks have 2, 2, 1 and none; rows of 48 have two scales."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 48))
    model = nn.Sequential(nn.Embedding(VOCAB, 48), body)
    model.add_module("lm_head", nn.Linear(48, VOCAB))
    return quantize_model(model.to(dtype), group_size=GROUP)


def split(model, **options):
    for module in list(shardable(model).modules()):
        if isinstance(module, QuantLinear):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def adam(cls, _keys=(), **options):
    return lambda model: cls(groups(model, **dict(_keys)), lr=1e-2, eps=EPS, **options)


METHODS = {
    "galore8bit": adam(optim.GaLoreAdamW8bit, min_8bit_size=0),
    "fira": adam(optim.FiraAdamW),
    "apollo-mini": adam(optim.APOLLOAdamW, {**optim.APOLLOAdamW.mini, "scale": 1.0}),
}


def saved(model):
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def trained(method, model, rank=0, size=1, steps=range(STEPS)):
    optimizer = METHODS[method](model)
    train(model, optimizer, steps, rank, size)
    return saved(model), states(optimizer), optimizer.memory()


def given(model):
    """After two steps on gradients that all processes know, which need nothing of another row."""
    optimizer = optim.APOLLOAdamW(groups(model), lr=1e-2, disable_nl=True)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else grad
        optimizer.step()
    return saved(model)


def gathered():
    """Bytes that a process sends for a weight (18, 64) in a forward; what comes of it, and what should: y, the gradient, values."""
    torch.manual_seed(0)
    layer = QuantLinear(64, 18, bias=False, group_size=GROUP)
    dense = layer.dequantized()
    fully_shard(shardable(layer), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    x, sent = torch.randn(3, 64).bfloat16(), []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # as torch calls it
    collective = getattr(dist, name)

    def counted(output, given, **options):
        sent.append(given.nbytes)
        return collective(output, given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, name, counted)
        y = layer(x)
    y.sum().backward()
    dense_y, summed = x.float() @ dense.T, x.float().sum(0).expand(18, 64)
    return sent, (y, dense_y), (layer.weight.grad.full_tensor(), summed), (layer.dequantized(), dense)


def refused(model):
    """What reads or writes rows as if they were floats is told so."""
    weight = model[1][0].weight
    answers = []
    for attempt in (lambda: weight + 1, lambda: weight.mul_(2.0)):
        with torch.no_grad(), pytest.raises(NotImplementedError) as error:
            attempt()
        answers.append(str(error.value))
    return answers


def pieces(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def go_on(rank, size, folder, first, last, method="fira", sharded=True):
    """Load step `first` from the folder, unless it is 0, train, and save step `last`."""
    model = split(build()) if sharded else build()
    optimizer = METHODS[method](model)
    if first:
        loaded = pieces(model, optimizer)
        dcp.load(loaded, checkpoint_id=f"{folder}/{first}")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, range(first, last), rank, size)
    dcp.save(pieces(model, optimizer), checkpoint_id=f"{folder}/{last}")
    return saved(model), states(optimizer)


def parts(rank, folder):
    out = {method: trained(method, split(build()), rank, SIZE) for method in METHODS}
    out["given"] = given(split(build()))
    out["gathered"], out["refused"] = gathered(), refused(split(build()))
    out["kept"] = go_on(rank, SIZE, folder, 0, 3)
    model, whole_state = split(build()), StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, other().state_dict(), options=whole_state)  # of one process
    out["full"], out["loaded"] = get_model_state_dict(model, options=whole_state), saved(model)
    model.load_state_dict(floats(), strict=False)
    out["quantized"] = saved(model)
    return out


def other():
    """Of other values."""
    model = build()
    for value in model.state_dict().values():
        value.copy_(value.flip(0))
    return model


def floats():
    return {"1.0.weight": torch.randn(64, 48, generator=torch.Generator().manual_seed(3))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def ranks(folder):
    return world.run(SIZE, parts, folder, timeout=300)


def assert_close(got, wanted, codes=2):
    """A gradient that is summed in another order moves a code now and then, and numbers by so much."""
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert got[name].dtype == want.dtype, name
        if want.dtype == torch.int8:
            apart = (got[name].int() - want.int()).abs()
            assert apart.max() <= codes and (apart > 0).float().mean() < 0.02, (name, apart.max(), (apart > 0).float().mean())
        else:
            torch.testing.assert_close(got[name], want, atol=2e-3, rtol=2e-2, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_ranks_train_as_one_process(ranks, method):
    start, (wanted, kept, memory) = saved(build()), trained(method, build())
    for name, codes in wanted.items():
        if name.endswith("codes"):
            assert (codes != start[name]).float().mean() > 0.1  # it does train
    for results in ranks:
        got, state, held = results[method]
        assert_close(got, wanted)
        assert all(torch.equal(got[name], ranks[0][method][0][name]) for name in got)
        assert {key: value["parameter"] for key, value in state.items() if "parameter" in value} == {
            key: value["parameter"] for key, value in kept.items() if "parameter" in value
        }
        assert held["scales"] < memory["scales"] and held["weights"] < 0.4 * memory["weights"]


def test_random_bits_are_those_of_the_whole(ranks):
    wanted = given(build())
    for results in ranks:
        for name, want in wanted.items():
            same = (results["given"][name] == want).float().mean()
            assert same == 1 if name.endswith("codes") else same > 0.98, (name, same)  # a product of fewer rows may round otherwise


def test_codes_cross_the_wire(ranks):
    """Of 18 rows 5 a process, with a byte an element and 4 for each of two scales, whatever the dtype of the layer."""
    for results in ranks:
        sent, (y, of_dense), (grad, summed), (values, dense) = results["gathered"]
        assert sent == [5 * (64 + 2 * 4)]
        assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), of_dense, atol=2**-6, rtol=2**-7)
        torch.testing.assert_close(grad, summed, atol=0, rtol=2**-8)  # of bf16
        assert torch.equal(values, dense)


def test_state_dicts_are_those_of_one_process(ranks):
    model = other()
    wanted = saved(model)
    model.load_state_dict(floats(), strict=False)
    for results in ranks:
        for found, want in ((ranks[0]["full"], wanted), (results["loaded"], wanted), (results["quantized"], model.state_dict())):
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.full
def test_a_run_goes_on_with_other_numbers_of_processes(ranks, folder):
    world.run(3, go_on, 3, folder, 3, 5, timeout=300)
    got, state = go_on(0, 1, folder, 5, STEPS, sharded=False)
    wanted, kept, _ = trained("fira", build())
    assert_close(got, wanted)
    assert state.keys() == kept.keys() and all(state[i].keys() == kept[i].keys() for i in kept)


def test_values_are_read_by_the_layer_alone(ranks):
    for results in ranks:
        assert all("read the values by the layer's dequantized()" in answer for answer in results["refused"])


def test_the_plan_deals_codes_out_once():
    model = build()
    optimizer = METHODS["fira"](model)
    train(model, optimizer, range(1))
    weights = [piece for piece in layout(model, optimizer).pieces if piece.category == "weights"]
    assert sum(piece.bytes for piece in weights) == sum(value.nbytes for value in model.state_dict().values())
    assert all(piece.rows for piece in weights)


def test_in_one_process_it_is_the_layer_that_it_was():
    model, other = shardable(build()), build()
    assert all(map(is_quantized, (model[1][0].weight, model[1][6].weight)))
    assert model.state_dict().keys() == other.state_dict().keys()
    for a, b in zip(trained("fira", model)[0].values(), trained("fira", other)[0].values(), strict=True):
        assert torch.equal(a, b)
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(model[1](x), other[1](x))
    with pytest.raises(RuntimeError, match="1.0.codes must be torch.int8 of shape"):
        model.load_state_dict({**other.state_dict(), "1.0.codes": torch.zeros(3, 3)})
    assert torch.equal(dequantize_model(model)[1][0].weight, dequantize_model(other)[1][0].weight)
    layer = QuantLinear(48, 16, weights="nf4")
    with pytest.raises(ValueError, match="0.weight must be in INT8 to be sharded, got NF4"):
        shardable(torch.nn.Sequential(layer))
    assert type(layer) is QuantLinear


def test_parts_are_merged_into_whole_weights_alone():
    model = shardable(build())
    with pytest.raises(ValueError, match="must not be made shardable for LoQT"):
        optim.LoQT(optim.param_groups(model, rank=4))
