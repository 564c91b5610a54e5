"""Optimizers on INT8 weights: the formula, resume to the bit, per-layer modes, what is refused."""

import io

import pytest
import torch
from small_model import EPS, backward, build, groups, train
from torch import nn

from lowrank_sys import reference
from lowrank_sys.nn import QuantLinear, dequantize_model, quantize_model
from lowrank_sys.optim import (
    APOLLOAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GrassAdamW,
    QGaLoreAdamW8bit,
)

LR = 1e-2
CASES = {
    "q-galore": (QGaLoreAdamW8bit, {}),
    "q-galore short": (QGaLoreAdamW8bit, {"proj_type": "short-moments", "moments": "rotate"}),
    "q-galore next": (QGaLoreAdamW8bit, {"refresh": "next"}),
    "galore8bit": (GaLoreAdamW8bit, {}),
    "apollo": (APOLLOAdamW, {}),
    "apollo-mini": (APOLLOAdamW, {"scale_type": "tensor"}),
}
# Whose ops write float weights only.
IN_FULL = {
    "galore": (GaLoreAdamW, {}),
    "galore-adafactor": (GaLoreAdafactor, {}),
    "fira": (FiraAdamW, {}),
    "frugal": (FrugalAdamW, {}),
    "grass": (GrassAdamW, {}),
}
CASES |= IN_FULL
EACH = pytest.mark.parametrize("name", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(name, dtype=torch.float32, per_layer=None, group_size=32):
    model = quantize_model(build(dtype), group_size=group_size)
    return model, optimizer_of(name, model, per_layer)


def optimizer_of(name, model, per_layer=None):
    cls, keys = CASES[name]
    rule = {"eps": EPS} if cls is not GaLoreAdafactor else {"relative_step": False, "scale_parameter": False}
    return cls(groups(model, **keys), lr=LR, weight_decay=0.1, per_layer=per_layer, **rule)


def stored(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bytes(a, b):
    a, b = stored(a), stored(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EACH
@DTYPES
def test_every_matrix_moves_and_the_loss_falls(name, dtype):
    model, optimizer = make(name, dtype)
    before, losses = stored(model), []
    for step in range(30):
        ids = torch.randint(0, 50, (128,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids).float(), ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    after = stored(model)
    assert losses[-1] < 0.3 * losses[0] and optimizer.skipped() == 0
    codes = [key for key in before if key.endswith("codes")]
    assert len(codes) == 2
    for key in codes:
        assert (after[key] != before[key]).float().mean() > 0.05
    for layer in (m for m in model if isinstance(m, QuantLinear)):
        assert layer.weight.untyped_storage().nbytes() == layer.weight.element_size()


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("quant", [True, False], ids=["int4", "dense"])
def test_the_step_is_the_oracle_of_its_parts(quant, left):
    """One step from an exact basis: the INT8 weight moves by lr scale back(x), to one code of its rounding."""
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(90, 70, bias=False), 32)
    r, scale, wd = 8, 0.25, 0.1
    optimizer = QGaLoreAdamW8bit(
        [
            {
                "params": [layer.weight],
                "rank": r,
                "subspace": "svd",
                "proj_type": "left" if left else "right",
                "quant": quant,
                "quant_group_size": 32,
                "scale": scale,
            }
        ],
        lr=LR,
        weight_decay=wd,
    )
    w = layer.weight
    old = reference.dequantize_int8(w.codes, w.scale, group_size=32)
    w.grad = torch.randn(70, 90) + 3 * torch.randn(70, 1) @ torch.randn(1, 90)
    optimizer.step()
    state = optimizer.state[w]
    basis = (
        state["basis"]
        if not quant
        else reference.dequantize_int4(
            state["basis"], state["basis_scale"], state["basis_offset"], d=70 if left else 90, group_size=32
        )
    )
    low_rank = basis.T @ w.grad if left else w.grad @ basis
    x = low_rank / (low_rank.abs() + 1e-8)  # Adam's first step
    want = (1 - LR * wd) * old - LR * scale * (basis @ x if left else x @ basis.T)
    new = reference.dequantize_int8(w.codes, w.scale, group_size=32)
    code = w.scale.repeat_interleave(32, dim=1)[:, :90]
    assert ((new - want).abs() <= 1.01 * code).all() and not torch.equal(new, old)
    # rounded up or down as the remainder says: without a bias, where to the nearest would leave most of it out
    error = (new - want).double()
    assert error.mean().abs() < 4 * (code.double() / 2).mean() / error.numel() ** 0.5


@EACH
@DTYPES
def test_resume_in_the_middle_of_a_gap_is_exact(name, dtype):
    """INT8 weights, INT4 bases, 8-bit moments, through torch.load(weights_only=True)."""
    model, optimizer = make(name, dtype)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed, resumed_optimizer = make(name, dtype)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    assert_same_bytes(model, resumed)
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, range(6, 15))
    assert_same_bytes(model, resumed)


@EACH
def test_in_backward_is_the_ordinary_step(name):
    dense, optimizer = make(name)
    train(dense, optimizer, range(10))
    model, optimizer = make(name, per_layer="in_backward")
    train(model, optimizer, range(10))
    assert_same_bytes(dense, model)


@pytest.mark.parametrize("name", ["q-galore", "galore8bit"])
def test_four_micro_batches_are_one_batch(name):
    """To rounding: a sum of other order may draw a neighbouring code for a weight."""
    models = []
    for micro in (1, 4):
        model, optimizer = make(name, per_layer="accumulate")
        train(model, optimizer, range(4), micro=micro)
        models.append(model)
    one, four = map(stored, models)
    for key in one:
        if key.endswith("codes"):
            apart = (one[key].int() - four[key].int()).abs()
            assert apart.max() <= 1 and (apart != 0).float().mean() < 0.01, key


def test_the_seed_decides_the_bits():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        layer = QuantLinear.from_linear(nn.Linear(64, 64, bias=False), 32)
        # the seed of the subspace is that of the bits: an exact basis leaves only these
        optimizer = GaLoreAdamW8bit([{"params": [layer.weight], "rank": 4, "subspace": "svd", "seed": seed}], lr=LR)
        layer.weight.grad = torch.randn(64, 64)
        optimizer.step()
        models.append(layer.codes.clone())
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_every_matrix_has_bits_of_its_own():
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(QuantLinear.from_linear(nn.Linear(64, 64, bias=False), 32))
    optimizer = GaLoreAdamW8bit([{"params": [layer.weight for layer in layers], "rank": 4, "subspace": "svd"}], lr=LR)
    grad = torch.randn(64, 64)
    for layer in layers:
        layer.weight.grad = grad.clone()
    optimizer.step()
    assert not torch.equal(layers[0].codes, layers[1].codes)


def test_the_ledger_knows_codes_and_scales():
    model, optimizer = make("q-galore")
    train(model, optimizer, range(1))
    matrices = [m for m in model if isinstance(m, QuantLinear)]
    floats = [p for p in model.parameters() if not any(p is m.weight for m in matrices)]
    memory = optimizer.memory()
    handles = sum(m.weight.element_size() for m in matrices)
    assert memory["weights"] == sum(m.codes.nbytes for m in matrices) + sum(p.nbytes for p in floats) + handles
    states = [optimizer.state[m.weight] for m in matrices]
    scales = ("basis_scale", "basis_offset", "exp_avg_absmax", "exp_avg_sq_absmax")
    assert {"exp_avg_absmax" in s for s in states} == {True, False}  # rows that are long enough for codes, and not
    assert memory["scales"] == sum(m.scale.nbytes for m in matrices) + sum(
        s[key].nbytes for s in states for key in scales if key in s
    )
    assert memory["basis"] == sum(s["basis"].numel() for s in states)


def test_apollo_with_small_plain_moments():
    """plain_8bit: only embeddings and head are coded; the matrices train as without."""
    models, kinds = [], []
    for plain_8bit in (False, True):
        model = quantize_model(build(), group_size=32)
        optimizer = APOLLOAdamW(groups(model), lr=LR, eps=EPS, plain_8bit=plain_8bit)
        for group in optimizer.param_groups:
            group["min_8bit_size"] = 1000
        train(model, optimizer, range(1))
        models.append(model)
        kinds.append({optimizer.state[model[0].weight]["exp_avg"].dtype, optimizer.state[model[1].weight]["exp_avg"].dtype})
    assert kinds == [{torch.float32}, {torch.uint8, torch.float32}]
    one, two = map(stored, models)
    assert all(torch.equal(one[key], two[key]) for key in one if "codes" in key)


@pytest.mark.parametrize("name", IN_FULL)
def test_an_op_of_float_weights_steps_on_the_values(name):
    """The change of the values is the float step's, to one code, and without a bias."""
    (model, optimizer), floats = make(name), make(name)[0]
    dequantize_model(floats)
    twin = optimizer_of(name, floats)
    layer = model[1]
    before = layer.dequantized()
    for m, o in ((model, optimizer), (floats, twin)):
        backward(m, 0)
        o.step()
    moved, want = layer.dequantized() - before, floats[1].weight.detach() - before
    code = layer.scale.repeat_interleave(32, dim=1)[:, : moved.shape[1]]
    error = (moved - want).double()
    assert want.abs().max() > 0 and (error.abs() <= 1.01 * code).all()
    assert error.mean().abs() < 4 * (code.double() / 2).mean() / error.numel() ** 0.5


def test_an_int8_weight_needs_a_rank():
    model = quantize_model(build(), group_size=32)
    with pytest.raises(ValueError, match="is a quantized weight, which trains in a group with a rank only"):
        QGaLoreAdamW8bit(model.parameters())


def test_a_nan_leaves_the_bytes_of_its_channel():
    model, optimizer = make("q-galore")
    train(model, optimizer, range(2))
    backward(model, 2)
    layer = model[1]
    before = layer.codes.clone()
    layer.weight.grad[5, 7] = torch.nan
    optimizer.step()
    left = optimizer.state[layer.weight]["left"]
    kept = layer.codes[:, 7] == before[:, 7] if left else layer.codes[5] == before[5]
    assert kept.all() and optimizer.skipped() == kept.numel()
    assert (layer.codes != before).any()
