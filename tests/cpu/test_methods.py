"""Every method by name: what all of them promise, and those on the general route against transcriptions of their papers."""

import argparse
import ast
import copy
import difflib
import io
import json
import shutil

import pytest
import torch
import transcriptions
from lanes import usual
from small_model import backward, build, loss_of, tokens
from torch import nn

from lowrank_sys import cli, optim
from lowrank_sys.memory import process
from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import SCALE, CapturedStep, COAPAdamW, FiraLion, GaLoreAdafactor, GaLoreAdamW, LDAdamW, SinkGD, fused
from lowrank_sys.optim.preset import METHODS
from lowrank_sys.subspace.iteration import seeded_basis
from lowrank_sys.subspace.select import SELECT

STEPS, GAP, LR, DECAY = 9, 4, 1e-2, 0.1
EACH = pytest.mark.parametrize("name", METHODS)
NEW = {"fira-lion": FiraLion, "coap": COAPAdamW, "ldadam": LDAdamW, "scale": SCALE, "sinkgd": SinkGD}
EACH_NEW = pytest.mark.parametrize("name", NEW)


# --- against the papers

COMMON = {"lr": LR, "weight_decay": DECAY}
ADAM = {**COMMON, "betas": (0.9, 0.999), "eps": 1e-8}
# (class, arguments, group keys, transcription, its hyper-parameters)
PAPERS = {
    "fira-lion": (
        FiraLion, COMMON, {"rank": 3, "update_proj_gap": GAP, "subspace": "svd", "alpha": 0.25},
        transcriptions.fira_lion, {**COMMON, "rank": 3, "gap": GAP, "alpha": 0.25, "betas": (0.9, 0.99)},
    ),
    "coap": (
        COAPAdamW, COMMON, {"rank": 3, "update_proj_gap": 2, "reproject_factor": 3},
        transcriptions.coap, {**ADAM, "rank": 3, "gap": 2, "reproject_factor": 3, "scale": 1.0},
    ),
    "coap, moments carried": (
        COAPAdamW, COMMON, {"rank": 3, "update_proj_gap": 2, "reproject_factor": 3, "moments": "rotate-roots", "scale": 0.5},
        transcriptions.coap, {**ADAM, "rank": 3, "gap": 2, "reproject_factor": 3, "scale": 0.5, "roots": True},
    ),
    "ldadam": (
        LDAdamW, COMMON, {"rank": 3},
        transcriptions.ldadam, {**ADAM, "betas": (0.908, 0.99), "rank": 3, "rho": 0.908, "scale": 1.0},
    ),
    "scale": (SCALE, COMMON, {"rank": None}, transcriptions.scale, {**COMMON, "over": "rows", "momentum": 0.0}),
    "scale, an embedding": (
        SCALE, COMMON, {"rank": None, "over": "columns"}, transcriptions.scale, {**COMMON, "over": "columns", "momentum": 0.0},
    ),
    "scale, a head": (
        SCALE, COMMON, {"rank": None, "momentum": 0.9}, transcriptions.scale, {**COMMON, "over": "rows", "momentum": 0.9},
    ),
    "sinkgd": (SinkGD, COMMON, {"rank": None}, transcriptions.sinkgd, {**COMMON, "passes": 5}),
}  # fmt: skip
SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (9, 9)}


def lone(cls, shape, keys, left=True, dtype=torch.float32, **arguments):
    """(a matrix, its optimizer)."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape).to(dtype))
    sides = {} if keys.get("rank") is None else {"proj_type": "left" if left else "right"}
    return matrix, cls([{"params": [matrix], **sides, **keys}], **{**COMMON, **arguments})


def gradients(shape, steps=STEPS):
    """Of a few strong directions, so that a basis is one of theirs, and a slow drift."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    for _ in range(steps):
        u = u + 0.2 * torch.randn(u.shape, generator=generator)
        yield u * torch.tensor([4.0, 2.0, 1.0]) @ v + 0.1 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_step_is_the_paper_s(paper, shape, left, scaler):
    cls, arguments, keys, formula, h = PAPERS[paper]
    matrix, optimizer = lone(cls, shape, keys, left, **arguments)
    if cls is COAPAdamW:
        h = {**h, "first_gap": 1, "first": seeded_basis(shape[0 if left else 1], 3, 0, matrix.data).double()}
    grads = list(gradients(shape))
    expected = formula(matrix.detach().double(), [g.double() for g in grads], left, **h)
    for t, (g, want) in enumerate(zip(grads, expected)):
        matrix.grad = g * 1024 if scaler else g
        if scaler:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
        optimizer.step()
        torch.testing.assert_close(matrix.detach().double(), want, atol=1e-5, rtol=1e-5, msg=lambda m: f"step {t}: {m}")


# --- gradients that are not to be used

KEYS = {name: ({"rank": None} if METHODS[name].rank is None else {"rank": 3, "update_proj_gap": 2}) for name in NEW}
KEYS["ldadam"] = {"rank": 3}


def warmed(name, left=True, steps=5, dtype=torch.float32, keys=None):
    matrix, optimizer = lone(NEW[name], (8, 12), KEYS[name] if keys is None else keys, left, dtype)
    for g in gradients((8, 12), steps):
        matrix.grad = g.to(dtype)
        optimizer.step()
    return matrix, optimizer


def held(matrix, optimizer):
    """Every tensor but the host's schedule, which counts on."""
    state = optimizer.state[matrix]
    return {
        "weight": matrix.detach().clone(),
        **{k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and k != "countdown"},
    }


@pytest.mark.parametrize("finite", [True, False], ids=["finite here", "not finite here"])
@pytest.mark.parametrize("due", [True, False], ids=["due", "not due"])
@EACH_NEW
def test_found_inf_leaves_every_byte(name, due, finite):
    keys = {"rank": None, "momentum": 0.9} if name == "scale" else None
    matrix, optimizer = warmed(name, steps=4 if due else 5, keys=keys)
    before = held(matrix, optimizer)
    matrix.grad = torch.randn(8, 12)
    if not finite:
        matrix.grad[1, 2] = torch.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.ones(())
    optimizer.step()
    after = held(matrix, optimizer)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert optimizer.skipped() == 0
    optimizer.found_inf = torch.zeros(())
    matrix.grad = torch.randn(8, 12)
    optimizer.step()
    assert not torch.equal(matrix, before["weight"])
    if due and "basis" in before:
        assert not torch.equal(optimizer.state[matrix]["basis"], before["basis"])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@EACH_NEW
def test_a_channel_that_is_not_finite_stays(name, left):
    """Between two refreshes: at one of LDAdam's, each step, a channel's moments are carried into the new basis."""
    keys = {"scale": {"rank": None, "momentum": 0.9}, "ldadam": {"rank": 3, "update_proj_gap": 100}}
    matrix, optimizer = warmed(name, left, keys=keys.get(name))
    by_column = METHODS[name].rank is not None and left
    channel = (slice(None), 5) if by_column else (3, slice(None))
    before = held(matrix, optimizer)
    matrix.grad = torch.randn(8, 12)
    matrix.grad[3, 5] = torch.nan
    optimizer.step()
    after = held(matrix, optimizer)
    names = {"weight", "exp_avg", "exp_avg_sq", "error"} & before.keys()
    for key in names:
        assert torch.equal(after[key][channel], before[key][channel]) and after[key].isfinite().all()
        assert not torch.equal(after[key], before[key])
    moved = (after["weight"] != before["weight"]).sum()
    assert moved == 96 - matrix[channel].numel() and optimizer.skipped() == matrix[channel].numel()


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, 1e30], ids=str)
@EACH_NEW
def test_a_refresh_that_cannot_be_stays_due(name, bad, first):
    matrix, optimizer = warmed(name, steps=0 if first else 4)
    matrix.grad = torch.zeros(8, 12) if bad == 0 else torch.full((8, 12), bad)
    optimizer.step()
    state = optimizer.state[matrix]
    values = held(matrix, optimizer)
    assert all(value.isfinite().all() for value in values.values())
    if "basis" in state:
        b = state["basis"]
        torch.testing.assert_close(b.T @ b, torch.eye(3), atol=0.1, rtol=0)  # COAP's leave the sphere by its steps
        matrix.grad = torch.randn(8, 12)
        optimizer.step()
        assert not torch.equal(state["basis"], values["basis"]) and state["basis"].isfinite().all()


@EACH_NEW
def test_zero_gradients(name):
    matrix, optimizer = lone(NEW[name], (8, 12), KEYS[name], weight_decay=0.0)
    before = matrix.detach().clone()
    for _ in range(6):
        matrix.grad = torch.zeros(8, 12)
        optimizer.step()
    assert torch.equal(matrix, before) and all(v.isfinite().all() for v in held(matrix, optimizer).values())
    matrix.grad = torch.randn(8, 12)
    optimizer.step()
    assert matrix.isfinite().all() and not torch.equal(matrix, before)


@pytest.mark.parametrize("tiny, large", [(1e-30, 1.0), (1e-20, 1e18), (1e-8, 1e15)])
def test_sinkgd_brings_every_row_to_one_norm_however_small(tiny, large):
    matrix, optimizer = lone(SinkGD, (8, 12), {"rank": None}, weight_decay=0.0)
    g = torch.randn(8, 12)
    g[2] *= tiny
    g[3] *= large
    g[5] = 0
    before, matrix.grad = matrix.detach().clone(), g
    optimizer.step()
    rows = ((before - matrix) / LR).norm(dim=1)
    assert rows[5] == 0 and matrix.isfinite().all()
    torch.testing.assert_close(rows[[2, 3]], torch.full((2,), 12**0.5), atol=0.5, rtol=0)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_ldadam_loses_nothing_of_a_gradient(left):
    """With betas of 0 what the basis left out, and only that, is in the error."""
    matrix, optimizer = lone(LDAdamW, (8, 12), {"rank": 3}, left, betas=(0.0, 0.99))
    seen, projected = torch.zeros(8, 12), torch.zeros(8, 12)
    for g in gradients((8, 12)):
        matrix.grad = g
        optimizer.step()
        state = optimizer.state[matrix]
        r, b = state["exp_avg"], state["basis"]  # with beta1 = 0 the moment is R
        seen, projected = seen + g, projected + (b @ r if left else r @ b.T)
        torch.testing.assert_close(state["error"], seen - projected, atol=1e-4, rtol=0)


def test_ldadam_s_error_in_bf16_is_rounded_once_a_sum():
    """A few roundings of what it adds up, where it is much smaller than the moment that it is corrected by."""
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix, optimizer = warmed("ldadam", dtype=dtype, steps=9, keys={"rank": 3})
        errors.append(optimizer.state[matrix]["error"].float())
    assert optimizer.state[matrix]["error"].dtype == torch.float32
    assert (errors[0] - errors[1]).norm() < 0.1 * errors[1].norm()


# --- what every method promises


def made(name, dtype=torch.float32, int8=False, per_layer=None, bits=None, **keys):
    """(a small model, its optimizer)."""
    method, model = METHODS[name], build(dtype)
    if int8:
        model = quantize_model(model, group_size=32)
    low = {"rank": None} if method.rank is None else {"rank": min(method.rank, 8), "update_proj_gap": GAP}
    plain = {"lr": 1e-2} if bits is None else {"lr": 1e-2, "min_8bit_size": 0}
    groups = method.groups(model, plain=plain, **{**low, **method.keys, **keys})
    options = {**method.options, **(method.int8_options if int8 else {}), **({} if bits is None else {"bits": bits})}
    return model, method.optimizer(groups, lr=1e-2, per_layer=per_layer, **options)


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def bytes_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "low_rank_gradients" not in name}


def assert_alike(a, b):
    a, b = bytes_of(a), bytes_of(b)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def mean_loss(model):
    with torch.no_grad():
        return sum(loss_of(model, tokens(step)).item() for step in range(4)) / 4


WEIGHTS = pytest.mark.parametrize(
    "how", [{}, {"dtype": torch.bfloat16}, {"int8": True}, {"int8": True, "dtype": torch.bfloat16}],
    ids=["fp32", "bf16", "int8", "int8 in bf16"],
)  # fmt: skip


@WEIGHTS
@EACH
def test_it_trains_resumes_and_accounts(name, how):
    model, optimizer = made(name, **how)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))  # in the middle of a gap

    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed, again = made(name, **how)
    run(resumed, again, range(1))
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    twin, twins = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (resumed, again), (twin, twins)):
        run(m, o, range(GAP + 2, 2 * GAP + 3))
    assert_alike(model, resumed)
    assert_alike(model, twin)

    run(model, optimizer, range(2 * GAP + 3, 20))
    assert mean_loss(model) < start - 0.05
    assert optimizer.skipped() == 0

    memory = optimizer.memory()
    assert memory["other"] == 0 and memory["gradients"] == 0
    own = sum(v.untyped_storage().nbytes() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    counters = sum(counter.nbytes for counter in optimizer.counters.values())
    weights = [t for p in model.parameters() for t in ((p.codes, p.scale, p) if hasattr(p, "codes") else (p,))]
    assert optimizer.state_bytes() == own
    assert memory["total"] == own + counters + sum(t.untyped_storage().nbytes() for t in weights)


@EACH_NEW
def test_moments_in_8_bits_train_and_resume(name):
    model, optimizer = made(name, bits=8, min_8bit_size=0)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq") if key in s]
    assert {moment.dtype for moment in moments} >= {torch.uint8} and optimizer.memory()["other"] == 0
    resumed, again = made(name, bits=8, min_8bit_size=0)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, again)):
        run(m, o, range(GAP + 2, 20))
    assert_alike(model, resumed)
    assert mean_loss(model) < start - 0.05


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@EACH
def test_in_backward_is_the_same_to_the_bit(name, int8):
    (model, optimizer), (other, hooked) = made(name, int8=int8), made(name, int8=int8, per_layer="in_backward")
    run(model, optimizer, range(2 * GAP + 1))
    run(other, hooked, range(2 * GAP + 1))
    assert_alike(model, other)


@EACH
def test_accumulate_where_a_step_starts_from_r(name):
    model, optimizer = made(name)
    subspaces = [group["subspace"] for group in optimizer.param_groups if "subspace" in group]
    from_sketch = all(SELECT[s].sketched for s in subspaces if s in SELECT)
    if METHODS[name].rank is None or not (optimizer.pipeline.from_low_rank and from_sketch):
        with pytest.raises(ValueError, match="per_layer='accumulate'|refresh='next'"):
            made(name, per_layer="accumulate")
        return
    start = mean_loss(model)
    model, optimizer = made(name, per_layer="accumulate")
    for step in range(20):
        backward(model, step, micro=2)
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(model) < start - 0.05


@EACH
def test_surroundings_change_no_bit(name):
    """A closure, a scheduler, autocast, another default dtype."""
    model, optimizer = made(name)
    other, same = made(name)
    for o in (optimizer, same):
        o.scheduler = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step)
    for step in range(GAP + 2):
        backward(model, step)
        optimizer.step()
        optimizer.scheduler.step()
        optimizer.zero_grad()

        def closure(step=step):
            same.zero_grad()
            loss = loss_of(other, tokens(step))
            loss.backward()
            return loss

        closure()
        grads = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
        torch.set_default_dtype(torch.bfloat16 if step % 2 else torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                same.step(lambda: [setattr(p, "grad", g) for p, g in zip(other.parameters(), grads)])
        finally:
            torch.set_default_dtype(torch.float32)
        same.scheduler.step()
    loss = same.step(closure)
    assert loss.dim() == 0 and loss.isfinite()
    backward(model, step)
    optimizer.step()
    assert_alike(model, other)


def test_no_two_methods_are_one():
    ends = {}
    for name in METHODS:
        model, optimizer = made(name)
        run(model, optimizer, range(20))
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    for i, (name, end) in enumerate(ends.items()):
        assert [other for other in list(ends)[:i] if torch.equal(ends[other], end)] == [], name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.rank is not None])
def test_every_basis_moves(name, side):
    model, optimizer = made(name, proj_type=side)
    matrices = next(group for group in optimizer.param_groups if "rank" in group)["params"]

    keys = ("basis", "key", "indices", "columns", "left_vectors")

    def bases():
        states = [optimizer.state[p] for p in matrices if optimizer.state.get(p)]
        return [torch.cat([state[key].flatten().double() for key in keys if key in state]) for state in states]

    run(model, optimizer, range(1))
    first = bases()
    run(model, optimizer, range(1, 2 * GAP + 2))
    sides = {optimizer.state[p]["left"] for p in matrices if "left" in optimizer.state.get(p, ())}
    assert sides == {side == "left"} or name == "mofasgd" and not sides
    assert first and len(first) == len(bases())
    assert not any(torch.equal(a, b) for a, b in zip(first, bases()))


# --- what is refused

MATRIX = [8, 12]
REFUSED = {
    "covariance without an error": (GaLoreAdamW, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs error"),
    "covariance of Lion": (FiraLion, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs exp_avg_sq, error"),
    "power without an error": (GaLoreAdamW, {"rank": 4, "subspace": "power"}, "subspace='power' needs error"),
    "coap without a moment": (GaLoreAdafactor, {"rank": 4, "subspace": "coap"}, "subspace='coap' needs exp_avg in the state"),
    "coap from sketches": (COAPAdamW, {"rank": 4, "refresh": "next"}, "subspace must be randomized, random with refresh='next'"),
    "GaLore without a rank": (GaLoreAdamW, {"rank": None}, "rank must be an integer of at least 1, got None"),
    "SCALE with a rank": (SCALE, {"rank": 8}, "rank must be None without a subspace, got 8"),
    "SinkGD with a rank": (SinkGD, {"rank": 8}, "rank must be None without a subspace, got 8"),
    "over": (SCALE, {"rank": None, "over": "all"}, "over must be one of rows, columns, got 'all'"),
    "SCALE's momentum": (SCALE, {"rank": None, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    "no passes": (SinkGD, {"rank": None, "passes": 0}, "passes must be an integer of at least 1, got 0"),
    "half a pass": (SinkGD, {"rank": None, "passes": 2.5}, "passes must be an integer of at least 1, got 2.5"),
    "rho": (LDAdamW, {"rank": 4, "rho": 1.5}, r"rho must be a number in \[0, 1\], got 1.5"),
    "reproject_factor": (COAPAdamW, {"rank": 4, "reproject_factor": 0}, "reproject_factor must be an integer of at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("cls, keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_when_it_is_built(cls, keys, message):
    options = {"relative_step": False, "scale_parameter": False, "lr": 1e-3} if cls is GaLoreAdafactor else {}
    with pytest.raises(ValueError, match=message):
        cls([{"params": [nn.Parameter(torch.randn(MATRIX))], **keys}], **options)


def test_a_captured_step_refuses_error_feedback():
    with pytest.raises(ValueError, match="must have no error feedback to be captured, got LDAdamW"):
        CapturedStep(lone(LDAdamW, MATRIX, {"rank": 4})[1])


@pytest.mark.parametrize("cls", NEW.values())
def test_an_unknown_argument_of_a_preset_is_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} takes .*, got momentumm"):
        cls([nn.Parameter(torch.randn(4))], momentumm=0.9)
    with pytest.raises(ValueError, match="bits must be 8 or 32, got 4"):
        cls([nn.Parameter(torch.randn(4))], bits=4)


# --- from the command line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in (ast, argparse, copy, difflib, shutil):
        shutil.copy(module.__file__, folder)
    return folder


@pytest.mark.parametrize("weights", usual(["int8"], "float"))
@EACH_NEW
def test_it_trains_from_the_command_line(name, weights, text, tmp_path):
    words = ["--method", name, "--model", "llama-1m", "--steps", "3", "--batch-size", "2", "--seq-len", "32", "--weights", weights]
    places = ["--data", str(text), "--out", str(tmp_path / "run"), "--device", "cpu", "--eval-tokens", "64", "--warmup-steps", "1"]
    assert cli.main(["train", *words, *places]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["method"] == name and summary["steps"] == 3 and summary["skipped"] == 0
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


@pytest.mark.parametrize("name", ["ldadam", "scale"])
def test_it_is_planned(name, capsys, monkeypatch):
    monkeypatch.setattr(process, "measure", lambda args: process.Baseline(2**30, 2**30, True))
    words = ["--method", name, "--model", "llama-1m", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--json"]
    assert cli.main(["plan", *words, "--device-memory", "8GiB"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert tensors["moments"] > 0 and (tensors["basis"] > 0) == (METHODS[name].rank is not None)


@pytest.mark.parametrize("name", ["scale", "sinkgd"])
def test_a_rank_of_a_method_without_one_is_an_error_of_the_command_line(name, text, tmp_path, capsys):
    words = ["--method", name, "--rank", "8", "--model", "llama-1m", "--data", str(text), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words, "--steps", "1", "--device", "cpu"]) != 0
    assert "rank must be None" in capsys.readouterr().err


# --- SCALE's groups


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "a tied head"])
def test_scale_s_groups(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    groups = METHODS["scale"].groups(model, plain={"lr": 1e-2}, seed=3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert sorted(name for group in names for name in group) == sorted(name for name, _ in model.named_parameters())
    vectors, matrices, *heads = names
    assert all("norm" in name for name in vectors) and len(matrices) == 7 and groups[0]["lr"] == 1e-2
    assert heads == ([["model.embed_tokens.weight"]] if tied else [["model.embed_tokens.weight"], ["lm_head.weight"]])
    assert groups[-1]["momentum"] == 0.9 and groups[-1].get("over", "rows") == "rows"
    assert tied or groups[2]["over"] == "columns"
    optimizer = SCALE(groups)
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    assert [p.shape for p in model.parameters() if p.dim() == 2 and "exp_avg" in optimizer.state[p]] == [(40, 16)]


@pytest.mark.parametrize("general", [False, True], ids=["fused", "general"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_fira_measures_what_a_basis_that_is_not_orthonormal_leaves(left, general, monkeypatch):
    if general:
        monkeypatch.setattr(fused, "fused", lambda batch: None)
    param = nn.Parameter(torch.zeros(24, 36))
    keys = {"rank": 4, "subspace": "coap", "proj_type": "left" if left else "right", "alpha": 0.5}
    optimizer = optim.FiraAdamW([{"params": [param], **keys}], lr=1e-2)
    optimizer.make_states([param])
    state, g = optimizer.state[param], torch.randn(24, 36, generator=torch.Generator().manual_seed(0))
    state["basis"].copy_(torch.randn(24 if left else 36, 4, generator=torch.Generator().manual_seed(1)))
    state["countdown"].fill_(9)
    param.grad = g.clone()
    optimizer.step()
    b, g = state["basis"].double(), g.double()
    r = b.T @ g if left else g @ b
    n, axis = 0.1 * r / ((0.001 * r * r).sqrt() + 1e-6), 0 if left else 1
    s = n.norm(dim=axis, keepdim=True) / r.norm(dim=axis, keepdim=True)
    rest = s * (g - 0.5 * (b @ r if left else r @ b.T))
    assert torch.allclose(state["limiter"].double(), rest.norm(), rtol=1e-4)
