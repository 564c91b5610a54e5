"""The rank of a matrix as a share of its shorter side and as a rule: as groups of these numbers have it, in files, and refused."""

import argparse
import functools
import io

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_sys.cli import CommandError
from lowrank_sys.nn import project_model, quantize_model
from lowrank_sys.optim import Accumulate, GaLoreAdamW, param_groups, welore_ranks
from lowrank_sys.optim.preset import METHODS
from lowrank_sys.train import flags, methods

SHAPES = {"a": (8, 12), "b": (16, 10), "c": (6, 6), "d": (2, 8, 12)}
RANKS = {"a": 2, "b": 4, "c": 3, "d": 2}
LOW_RANK = [name for name, method in METHODS.items() if method.rank is not None]


def rule(name, weight):
    assert tuple(weight.shape) == SHAPES[name]
    return RANKS[name]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def keys_of(name, **keys):
    return {**METHODS[name].keys, "update_proj_gap": 2, **keys}


def build(name, groups):
    return METHODS[name].optimizer(groups, lr=1e-2, **METHODS[name].options)


def step(optimizer, params, number):
    generator = torch.Generator().manual_seed(number)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("name", [*LOW_RANK, "muon", "asgo"])
def test_a_rule_gives_each_matrix_the_rank_that_a_group_of_its_own_would(name):
    """To the bit, of the weights and of all that is kept; a file has the numbers, and a run goes on from it."""
    params, apart, again = parameters(), parameters(), parameters()
    optimizer = build(name, [{"params": list(params.items()), "rank": rule, **keys_of(name)}])
    other = build(name, [{"params": [(key, p)], "rank": RANKS[key], **keys_of(name)} for key, p in apart.items()])
    assert optimizer.param_groups[0]["rank"] == tuple(RANKS.values())
    for number in range(3):
        step(optimizer, params, number)
        step(other, apart, number)
    for key, p in params.items():
        assert torch.equal(p, apart[key])
        assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
        assert_equal(optimizer.state[p], other.state[apart[key]])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0]["rank"] == tuple(RANKS.values())
    resumed = build(name, [{"params": list(again.items()), "rank": list(RANKS.values()), **keys_of(name)}])
    for key, p in again.items():
        p.data.copy_(params[key])
    resumed.load_state_dict(saved)
    step(optimizer, params, 3)
    step(resumed, again, 3)
    assert all(torch.equal(params[key], again[key]) for key in SHAPES)


def test_a_share_is_of_the_shorter_side_and_at_least_1():
    for share, want in ((0.5, (4, 5, 3, 4)), (0.01, 1), (0.25, 2), (torch.tensor(0.75), (6, 8, 4, 6)), (np.float64(0.125), 1)):
        optimizer = GaLoreAdamW([{"params": list(parameters().values()), "rank": share}])
        assert optimizer.param_groups[0]["rank"] == want
        step(optimizer, dict(enumerate(optimizer.param_groups[0]["params"])), 0)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Tanh(), nn.Linear(24, 0))


def of_a_model(name, weight):
    return {"0.weight": 5, "2.weight": 3}[name]


def train(model, optimizer, steps=4):
    for number in range(steps):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(number))
        model[:4](x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("rank, want", [(0.25, 6), (of_a_model, (5, 3))], ids=["share", "rule"])
def test_param_groups_and_project_model_take_them(rank, want):
    """What has no entries is plain; layers of project_model train as those whose gradients the optimizer projects."""
    ends = []
    for kind in ("accumulate", "projected"):
        model = mlp()
        if kind == "projected":
            model = project_model(model, rank, side="right")
            assert model[0].rank == (want if rank == 0.25 else 5) and not hasattr(model[4], "rank")
        sides = {} if kind == "projected" else {"proj_type": "right"}
        groups = param_groups(model, rank, update_proj_gap=2, **sides)
        assert "4.weight" in [name for name, _ in groups[0]["params"]]
        optimizer = GaLoreAdamW(groups, lr=1e-2, per_layer=Accumulate())
        assert [group["rank"] for group in optimizer.param_groups if "rank" in group] == [want]
        ends.append(train(model, optimizer))
    for ours, other in zip(*ends):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)


def test_layers_keep_the_rank_that_project_model_gave_them():
    model = project_model(mlp()[:4], of_a_model)
    with pytest.raises(ValueError, match="rank must be what project_model was given, which made it 5 of 0, got 0.5"):
        param_groups(model, 0.5)
    with pytest.raises(ValueError, match="rank must be 5, as project_model was given, got 4"):
        param_groups(model, 4)
    optimizer = GaLoreAdamW(param_groups(model, lambda name, weight: 1), lr=1e-2)
    assert sorted(group["rank"] for group in optimizer.param_groups if "rank" in group) in ([3, 5], [(5, 3)])


@pytest.mark.parametrize("bad", [1.0, 1.5, -0.5, 0, True, "0.5", (2, 3), [4], torch.ones(2)], ids=str)
@pytest.mark.parametrize("take", [param_groups, project_model])
def test_what_is_no_rank_is_refused(take, bad):
    with pytest.raises(ValueError, match=r"rank must be an integer of at least 1, got .* \(or a share of the shorter side"):
        take(mlp()[:4], bad)


@pytest.mark.parametrize("bad", [0, 25, 2.0, None, "2"], ids=str)
def test_a_rule_that_gives_none_is_refused_by_the_weight(bad):
    for take in (project_model, lambda model, rank: GaLoreAdamW(param_groups(model, rank))):
        with pytest.raises(ValueError, match=r"rank must give an integer from 1 to 24 for 0.weight of shape \(40, 24\), got "):
            take(mlp()[:4], lambda name, weight: bad)


def test_ranks_of_a_group_are_as_many_as_its_parameters_and_those_of_its_state():
    weight = parameters()["a"]
    with pytest.raises(ValueError, match="rank must have an integer for each of 1 parameters, got 2"):
        GaLoreAdamW([{"params": [weight], "rank": (2, 3)}])
    with pytest.raises(ValueError, match=r"rank must be at most 8 for parameter 1 of shape \(2, 8, 12\), got 9"):
        GaLoreAdamW([{"params": [parameters()["b"], parameters()["d"]], "rank": (2, 9)}])
    with pytest.raises(ValueError, match="bias must have two or more dimensions to be in a group with a rank"):
        GaLoreAdamW([{"params": [("bias", nn.Parameter(torch.zeros(3)))], "rank": 0.5}])
    one, other = (GaLoreAdamW([{"params": list(parameters().values()), "rank": rank}]) for rank in (0.5, 0.25))
    with pytest.raises(ValueError, match=r"rank of the loaded group 0 must be 2, as of this optimizer's, got \(4, 5, 3, 4\)"):
        other.load_state_dict(one.state_dict())


def parsed(*words):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args([*words])
    flags.check(args)
    return args


@pytest.mark.parametrize("name", LOW_RANK)
def test_every_method_takes_a_share_from_the_command_line(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    )
    args = parsed("--method", name, "--rank", "0.25")
    assert args.rank == 0.25 and "--rank=0.25" in flags.words(args)
    optimizer = methods.build(model, args)
    assert all(group["rank"] == 4 for group in optimizer.param_groups if "rank" in group)


@pytest.mark.parametrize("bad", ["0", "-1", "1.0", "2.5", "0.0"])
def test_the_command_line_refuses_what_is_no_rank(bad):
    with pytest.raises(CommandError, match="--rank: got .*; it must be an integer of at least 1, or a number in"):
        parsed("--rank", bad)


# --- WeLore's


def spectra(tail, model=None):
    """A model whose first weight has singular values 1, 1/2, 1/3, ... and whose second has `tail`'s."""
    model = mlp()[:4] if model is None else model
    for layer, values in ((model[0], 1 / torch.arange(1, 25)), (model[2], tail)):
        u, _, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data.copy_(u * values @ vh)
    return model


@pytest.mark.parametrize("by", ["values", "energy"])
@pytest.mark.parametrize("asked", [{"ratio": 0.5}, {"budget": 20}, {"budget": 2}, {"ratio": 1.0}], ids=str)
def test_one_threshold_gives_the_ranks(asked, by):
    tail = 0.97 ** torch.arange(24.0)
    model = spectra(tail)
    found = welore_ranks(model, by=by, **asked)
    budget = asked.get("budget", round(48 * asked.get("ratio", 0)))
    assert list(found.ranks) == ["0.weight", "2.weight"] and sum(found.ranks.values()) == budget
    for name, values in (("0.weight", 1 / torch.arange(1, 25).double()), ("2.weight", tail.double())):
        scores = values / values[0] if by == "values" else torch.stack([values[i:].square().sum() for i in range(24)])
        scores = scores / scores[0]
        rank = found.ranks[name]
        assert (scores[:rank] >= found.threshold - 1e-5).all() and (scores[rank:] <= found.threshold + 1e-5).all()
    assert found.low_rank == tuple(name for name, rank in found.ranks.items() if rank < 12)
    assert sorted(found.low_rank + found.other) == sorted(found.ranks)
    if asked == {"ratio": 0.5}:
        assert found.low_rank == ("0.weight",) and found.other == ("2.weight",)


def test_they_are_ranks_of_groups_and_of_layers():
    found = welore_ranks(spectra(0.97 ** torch.arange(24.0)), budget=20)
    optimizer = GaLoreAdamW(param_groups(mlp()[:4], found), lr=1e-2)
    assert optimizer.param_groups[1]["rank"] == tuple(found.ranks.values())
    assert [project_model(mlp()[:4], found)[i].rank for i in (0, 2)] == list(found.ranks.values())
    unnamed = [p for p in mlp()[:4].parameters() if p.dim() == 2]
    with pytest.raises(ValueError, match="rank must be known of parameter 0, these are of 2 weights by their names in the model"):
        GaLoreAdamW([{"params": unnamed, "rank": found}])


def test_int8_weights_and_weights_of_zeros_have_spectra_too():
    model = spectra(torch.zeros(24))
    assert welore_ranks(model, budget=10).ranks == {"0.weight": 9, "2.weight": 1}
    assert welore_ranks(quantize_model(spectra(torch.ones(24))), budget=10).ranks["2.weight"] > 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either ratio or budget must be given, got ratio=None and budget=None"),
        ({"ratio": 0.5, "budget": 9}, "either ratio or budget must be given, got ratio=0.5 and budget=9"),
        ({"ratio": 0}, r"ratio must be in \(0, 1\], got 0"),
        ({"budget": 1}, "budget must be from 2, the number of weights, to 48, their full ranks, got 1"),
        ({"budget": 49}, "budget must be from 2, .* to 48, their full ranks, got 49"),
        ({"ratio": 0.5, "by": "size"}, "by must be 'values' or 'energy', got 'size'"),
        ({"ratio": 0.5, "target_modules": ["q_proj"]}, "model must have a trainable linear layer, got Sequential"),
    ],
)
def test_what_welore_cannot_serve_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        welore_ranks(mlp()[:4], **options)
    with torch.device("meta"), pytest.raises(ValueError, match="0.weight must have values, got a weight on the meta device"):
        welore_ranks(mlp()[:4], budget=4)
