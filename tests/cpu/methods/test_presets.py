"""Every preset: its state in bytes, inputs of every kind, and what one of them promises alone."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from methods.inputs import COMMON, STEPS, gradients, matrix_of
from methods.transcriptions.flora import flora
from torch import nn

import lowrank_sys
from lowrank_sys.optim import Accumulate, Flora, LDAdamW, OnlineSubspaceDescent, SARAAdamW, SubTrackAdamW, param_groups
from lowrank_sys.optim.preset import METHODS, Preset
from lowrank_sys.subspace.gaussian import gaussian_basis
from lowrank_sys.train import flags, methods

EACH = pytest.mark.parametrize("name", METHODS)
# Methods that draw which weights of a group train: not all of them move.
DRAWN = ("frugal-blocks", "gum", "lisa", "owlore")
EACH_OF_ALL = pytest.mark.parametrize("name", [name for name in METHODS if name not in DRAWN])


def low_rank_keys(name, rank=3, **keys):
    """Group keys of a method's matrices."""
    method = METHODS[name]
    return {**method.keys, **({"rank": None} if method.rank is None else {"rank": min(rank, method.rank), **keys})}


def preset(name, params, left=None, **keys):
    """The optimizer of a method over a group of matrices."""
    sides = {} if left is None or METHODS[name].rank is None else {"proj_type": "left" if left else "right"}
    group = {"params": params, **low_rank_keys(name), **sides, **keys}
    return METHODS[name].optimizer([group], **COMMON, **METHODS[name].options)


def run(optimizer, params, steps, start=0):
    """Steps start ... steps - 1 of the same gradients."""
    series = [list(gradients(p.shape, steps)) for p in params]
    for step in range(start, steps):
        for p, own in zip(params, series):
            p.grad = own[step].to(p.dtype)
        optimizer.step()


def test_a_method_is_one_short_file():
    files = [path for path in (Path(lowrank_sys.__file__).parent / "optim" / "methods").glob("*.py") if path.stem != "__init__"]
    long = {path.name: lines for path in files if (lines := len(path.read_text().splitlines())) > 80}
    assert files and long == {}


# --- the state in bytes

# Elements of R beside those of the basis and the schedule, and bytes of the basis, of an fp32 matrix (m, n) of rank r with a
# basis of d entries: {name: (fp32 numbers, bytes of the basis)}; m is the unprojected side too.
M, N, R = 24, 40, 3
LOW, BASIS, KEY = 2 * R * N, 4 * M * R, 32
BYTES = {
    "galore": 4 * LOW + BASIS,
    "galore8bit": 4 * LOW + BASIS,  # moments of fewer than 4096 elements stay in fp32
    "galore-adafactor": 4 * (R + N) + BASIS,
    "q-galore": 4 * LOW + R * M // 2 + 2 * 4 * R + 4 * 5,  # codes, scales and offsets, the queue of overlaps
    "grass": 4 * LOW + 4 * R,
    "loqt": 4 * LOW + R * M // 2 + 2 * 4 * R,  # of float weights; for others see test_loqt.py
    "apollo": 4 * LOW + KEY + 4,
    "apollo-mini": 4 * 2 * N + KEY + 4,
    "fira": 4 * LOW + BASIS + 4,
    "fira-lion": 4 * LOW // 2 + BASIS + 4,
    "frugal": 4 * LOW + BASIS,
    "frugal-columns": 4 * LOW + 4 * R,
    "coap": 4 * LOW + BASIS,
    "ldadam": 4 * LOW + BASIS + 4 * M * N,
    "scale": 0,
    "sinkgd": 0,
    "dct": 4 * LOW + 4 * R,
    "sara": 4 * LOW + BASIS,
    "osd": 4 * LOW + 3 * BASIS,
    "subtrack": 4 * LOW + BASIS + 4,
    "snsm": 4 * (R * N + N) + BASIS,
    "galore-plus": 4 * LOW + BASIS + 12 * 10,  # a hundredth of the entries
    "flora": 4 * (R * N + M + N) + KEY,
    "muon": 4 * M * N,
    "asgo": 4 * (M * N + M * M),  # a square of the short side
    "galore-lion": 4 * R * N + BASIS,
    "mofasgd": 4 * R * (M + N + 1),
    "gradnormlorp": 4 * LOW + BASIS + 8 * M,
    "lisa": 8 * M * N,
    "frugal-blocks": 8 * M * N,  # of a layer that is drawn, else nothing
    "owlore": 4 * LOW + BASIS,
    "gum": 4 * M * N + BASIS,  # of a layer that is drawn
    "grades": 8 * M * N + 1,
}


@EACH
def test_the_state_is_as_large_as_the_formula_says(name):
    """Beside the schedule: integers on the host, and the step."""
    matrix = nn.Parameter(matrix_of((M, N)))
    optimizer = preset(name, [matrix], left=True)
    run(optimizer, [matrix], 2)
    state = optimizer.state[matrix]
    schedule = ("step", "countdown", "refreshes", "gap", "started")
    kept = {key: value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor) and key not in schedule}
    assert sum(kept.values()) == BYTES[name], kept


# --- inputs of every kind


def held(optimizer, params):
    return [p.detach().clone() for p in params], [
        {key: value.clone() for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)} for p in params
    ]


@EACH
def test_zero_gradients_change_nothing_and_spoil_nothing(name):
    matrix = nn.Parameter(matrix_of((8, 12)))
    optimizer = preset(name, [matrix], weight_decay=0.0)
    before = matrix.detach().clone()
    for _ in range(4):
        matrix.grad = torch.zeros(8, 12)
        optimizer.step()
    assert torch.equal(matrix, before)
    run(optimizer, [matrix], 3)
    (weight,), (state,) = held(optimizer, [matrix])
    assert not torch.equal(weight, before) and weight.isfinite().all()
    assert all(value.isfinite().all() for key, value in state.items() if key != "overlaps")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 4], ids=["first", "later"])
@EACH
def test_a_gradient_that_is_not_finite_spoils_nothing(name, step, value):
    matrix = nn.Parameter(matrix_of((8, 12)))
    optimizer = preset(name, [matrix], **({} if METHODS[name].rank is None else {"update_proj_gap": 2}))
    run(optimizer, [matrix], step)
    before = matrix.detach().clone()
    matrix.grad = torch.full((8, 12), value)
    optimizer.step()
    assert torch.equal(matrix, before) and optimizer.skipped() == 96
    matrix.grad = matrix_of((8, 12), 5)
    matrix.grad[3, 5] = value
    optimizer.step()
    assert matrix.isfinite().all() and 96 <= optimizer.skipped() < 192  # no more than its channel, where that has a part at all
    if name != "grass":  # whose weight decays there, in a row that it has not selected and does not read
        assert matrix[3, 5] == before[3, 5] and 84 <= (matrix != before).sum() <= 192 - optimizer.skipped()
    run(optimizer, [matrix], step + 4, start=step)
    (weight,), (state,) = held(optimizer, [matrix])
    assert weight.isfinite().all() and not torch.equal(weight, before)
    assert all(value.isfinite().all() for key, value in state.items() if key != "overlaps")


@EACH_OF_ALL
def test_a_weight_of_three_dimensions_is_its_matrices(name):
    stack = nn.Parameter(matrix_of((2, 8, 12)))
    alone = [nn.Parameter(one.clone()) for one in stack.detach()]
    optimizer, other = preset(name, [stack]), preset(name, alone)
    series = list(gradients(stack.shape, 6))
    for g in series:
        stack.grad = g
        optimizer.step()
        for one, own in zip(alone, g):
            one.grad = own.clone()
        other.step()
    assert torch.equal(stack, torch.stack(list(alone)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@EACH_OF_ALL
def test_a_group_of_mixed_shapes(name, dtype):
    """Steps of one matrix are the same whatever is beside it, but for its number, which is the seed of what is drawn."""
    shapes = [(8, 12), (12, 8), (9, 9), (8, 12), (4, 3, 3, 3), (2, 8, 12)]
    params = [nn.Parameter(matrix_of(shape, i).to(dtype)) for i, shape in enumerate(shapes)]
    optimizer = preset(name, params)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 6)
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(params, before))
    alone = nn.Parameter(before[0].clone())
    first = preset(name, [alone])
    run(first, [alone], 1)
    again = [nn.Parameter(p.clone()) for p in before]
    run(preset(name, again), again, 1)
    assert torch.equal(again[0], alone)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name].optimizer, Preset)])
def test_moments_in_8_bits_stay_near_those_in_32(name, left):
    """Within a twentieth of the way that the weights went, over bases that come and go; where a rule makes all directions of its
    momentum count alike, the small ones too, within a fifth."""
    ends = []
    for bits in (8, 32):
        matrix = nn.Parameter(matrix_of((96, 80)))
        keys = low_rank_keys(name, 64) if name != "scale" else {"rank": None, "momentum": 0.9}
        sides = {} if METHODS[name].rank is None else {"proj_type": "left" if left else "right", "update_proj_gap": 2}
        group = {"params": [matrix], **keys, **sides, "min_8bit_size": 0}
        optimizer = METHODS[name].optimizer([group], **COMMON, **METHODS[name].options, bits=bits)
        for step in range(6):
            matrix.grad = matrix_of((96, 80), step)  # of no few directions, beside which others would be coded as 0
            optimizer.step()
        ends.append(matrix.detach())
        coded = [key for key, value in optimizer.state[matrix].items() if getattr(value, "dtype", None) == torch.uint8]
        assert ("exp_avg" in coded) == (bits == 8 and "exp_avg" in optimizer.state[matrix])
    assert (ends[0] - ends[1]).norm() < (0.2 if name == "gum" else 0.05) * (ends[1] - matrix_of((96, 80))).norm()


@EACH
def test_it_is_built_from_the_command_line(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(["--method", name, *(["--rank", "4"] if METHODS[name].rank is not None else [])])
    flags.check(args)
    optimizer = methods.build(model, args)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- what one of them promises alone


def test_sara_draws_in_proportion_to_singular_values():
    """One of three, and one of the two that are left: each within four standard deviations of its share."""
    values, count = torch.tensor([3.0, 2.0, 1.0]), 600
    g = torch.diag(values)
    matrix = nn.Parameter(torch.zeros(3, 3))
    optimizer = SARAAdamW([{"params": [matrix], "rank": 2, "update_proj_gap": 1}], lr=1e-3)
    seen = torch.zeros(3)
    for _ in range(count):
        matrix.grad = g
        optimizer.step()
        seen += optimizer.state[matrix]["basis"].abs().sum(1).round()
    shares = values / 6
    wanted = torch.stack([shares[i] + sum(shares[j] * shares[i] / (1 - shares[j]) for j in range(3) if j != i) for i in range(3)])
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert seen.sum() == 2 * count and ((seen / count - wanted).abs() < 4 * spread).all(), (seen / count, wanted)


def test_osd_keeps_its_basis_near_orthonormal_and_follows_the_gradient():
    """Of a gradient that turns into another subspace, most is in the span in the end; the vectors keep about their length."""
    g, matrix = list(gradients((24, 40), 2)), nn.Parameter(torch.zeros(24, 40))
    optimizer = OnlineSubspaceDescent([{"params": [matrix], "rank": 3}], lr=1e-2)
    shares = []
    for step in range(120):
        matrix.grad = torch.roll(g[0], 7, 0) if step else g[0]
        optimizer.step()
        b = optimizer.state[matrix]["basis"]
        q = torch.linalg.qr(b).Q
        shares.append((q.T @ matrix.grad).norm() / matrix.grad.norm())
        assert torch.linalg.svdvals(b).max() < 1.6 and torch.linalg.svdvals(b).min() > 0.6
    assert shares[1] < 0.6 and shares[-1] > 0.95


def test_what_chooses_after_the_step_is_refused_beside_error_feedback():
    with pytest.raises(ValueError, match="subspace must choose before the step for ErrorFeedback"):
        LDAdamW([{"params": [nn.Parameter(torch.zeros(8, 12))], "rank": 3, "subspace": "online", "moments": "keep"}])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_subtrack_descends_along_a_geodesic(left):
    """On both sides: vectors stay orthonormal, and of one gradient less is left after each step of the basis."""
    g, matrix = matrix_of((12, 16)), nn.Parameter(torch.zeros(12, 16))
    keys = {"rank": 3, "update_proj_gap": 1, "geodesic_step": 5e-3, "proj_type": "left" if left else "right"}
    optimizer = SubTrackAdamW([{"params": [matrix], **keys}], lr=1e-2)
    matrix.grad = matrix_of((12, 16), 1)
    optimizer.step()
    matrix.grad, shares = g, []
    for _ in range(30):
        optimizer.step()
        b = optimizer.state[matrix]["basis"]
        torch.testing.assert_close(b.T @ b, torch.eye(3), atol=1e-5, rtol=0)
        shares.append(float((b.T @ g if left else g @ b).norm() / g.norm()))
    assert all(late > early for early, late in zip(shares, shares[1:])) and shares[-1] > shares[0] + 0.1


def test_flora_accumulates_what_it_compresses():
    """Two micro-batches a step, whose gradients never exist beside each other: the step of the sum of their compressions."""
    torch.manual_seed(0)
    model = nn.Linear(12, 8, bias=False)
    first, gap = model.weight.detach().double(), 3
    optimizer = Flora(param_groups(model, rank=3, update_proj_gap=gap, seed=0)[1:], **COMMON, per_layer=Accumulate(model=model))
    inputs, outputs = torch.randn(STEPS, 2, 5, 12), torch.randn(STEPS, 2, 5, 8)
    where = {"d": 8, "rank": 3, "seed": 0, "parameter": 0}
    bases = [gaussian_basis(step=i, **where).double() for i in range(STEPS // gap + 1)]
    grads = [(y.double().mT @ x.double()).sum(0) for x, y in zip(inputs, outputs)]
    h = {**COMMON, "gap": gap, "scale": 1.0, "beta1": 0.9, "bases": bases, "compressed": True}
    for x, y, want in zip(inputs, outputs, flora(first, grads, True, **h)):
        for part, target in zip(x, y):
            (model(part) * target).sum().backward()
        assert model.weight.grad is None or model.weight.grad.numel() == 0 or not model.weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach().double(), want, atol=1e-5, rtol=1e-5)


def test_galore_plus_takes_the_heads_of_an_attention():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    groups = METHODS["galore-plus"].groups(model, 4, proj_type="std", update_proj_gap=2)
    kinds = {name.split(".")[-2]: (g["proj_type"], g.get("heads")) for g in groups[1:] for name, _ in g["params"]}
    heads = {"q_proj": ("right", 4), "k_proj": ("right", 2), "v_proj": ("right", 2), "o_proj": ("left", 4)}
    assert kinds == {**heads, **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), ("std", None))}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = METHODS["galore-plus"].optimizer(groups, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_a_share_of_entries_that_is_none_is_refused(density):
    with pytest.raises(ValueError, match=r"residual_density must be in \(0, 1\], got"):
        METHODS["galore-plus"].optimizer([nn.Parameter(torch.zeros(3))], residual_density=density)


def test_a_choice_of_frugal_that_is_none_is_refused():
    with pytest.raises(ValueError, match="choice must be one of basis, columns, got 'rows'"):
        METHODS["frugal"].optimizer([nn.Parameter(torch.zeros(3))], choice="rows")
