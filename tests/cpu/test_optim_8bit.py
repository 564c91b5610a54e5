"""GaLoreAdamW8bit and QGaLoreAdamW8bit: the method, its state and its bytes, resume, per-layer modes."""

import copy
import io
import warnings

import pytest
import torch
from small_model import CLOSE, EPS, assert_same, backward, build, groups, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowrank_sys import reference
from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.optim import (
    APOLLOAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GrassAdamW,
    InBackward,
    QGaLoreAdamW8bit,
    ledger,
    param_groups,
)
from lowrank_sys.optim.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from lowrank_sys.subspace.basis import load
from lowrank_sys.subspace.iteration import svd_basis

ops = torch.ops.lowrank
LR, SCALE = 1e-2, 0.25
# R of the two matrices of the small model has 96 * 16 elements: one with rows of 96, which is coded, one with rows of 16, which
# stays in fp32 as biases and norms do.
SMALLEST = 300


def optimizer_of(cls, model, per_layer=None, plain=None, **keys):
    return cls(groups(model, plain=plain, **keys), lr=LR, eps=EPS, min_8bit_size=SMALLEST, per_layer=per_layer)


CASES = {
    "galore8bit": (GaLoreAdamW8bit, {}),
    "galore8bit rotate": (GaLoreAdamW8bit, {"moments": "rotate"}),
    "q-galore": (QGaLoreAdamW8bit, {}),
    "q-galore left": (QGaLoreAdamW8bit, {"proj_type": "left", "quant_group_size": 32}),
    "q-galore rotate": (QGaLoreAdamW8bit, {"moments": "rotate"}),
    "q-galore reset svd": (QGaLoreAdamW8bit, {"moments": "reset", "subspace": "svd"}),
    "q-galore next": (QGaLoreAdamW8bit, {"refresh": "next"}),
    "q-galore dense": (QGaLoreAdamW8bit, {"quant": False}),
}
EACH = pytest.mark.parametrize("name", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(name, model, per_layer=None):
    cls, keys = CASES[name]
    return optimizer_of(cls, model, per_layer, **keys)


def steps_of(model, optimizer, steps):
    for step in steps:
        model.zero_grad()
        backward(model, step)
        optimizer.step()


@EACH
def test_trains(name):
    model = build()
    optimizer = make(name, model)
    losses = []
    for step in range(40):
        model.zero_grad()
        ids = torch.randint(0, 50, (128,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0] and optimizer.skipped() == 0


@pytest.mark.parametrize("quant", [True, False], ids=["int4", "dense"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_the_loop_of_the_oracle(proj_type, quant):
    """Exact bases every third step, INT4, Adam on codes, decay: the formulas in plain PyTorch."""
    torch.manual_seed(0)
    m, n, r, left = 70, 90, 64, proj_type == "left"
    start, wd, betas = torch.randn(m, n), 0.1, (0.9, 0.999)
    param = nn.Parameter(start.clone())
    optimizer = QGaLoreAdamW8bit(
        [
            {
                "params": [param],
                "rank": r,
                "update_proj_gap": 3,
                "subspace": "svd",
                "proj_type": proj_type,
                "quant": quant,
                "quant_group_size": 32,
                "cos_threshold": None,
                "scale": SCALE,
            }
        ],
        lr=LR,
        betas=betas,
        weight_decay=wd,
        min_8bit_size=0,
    )
    w, basis, low_rank = start.clone(), None, (r, n) if left else (m, r)
    moments = [*(torch.zeros(low_rank, dtype=torch.uint8) for _ in "mv"), *(torch.zeros(low_rank[0], 1) for _ in "mv")]
    for step in range(8):
        grad = torch.randn(m, n) + 3 * torch.randn(m, 1) @ torch.randn(1, n)
        param.grad = grad.clone()
        optimizer.step()
        if step % 3 == 0:
            basis, _ = svd_basis(grad, basis, rank=r, left=left)
            if quant:
                basis = reference.dequantize_int4(*reference.quantize_int4(basis, group_size=32), d=basis.shape[0], group_size=32)
        g = basis.T @ grad if left else grad @ basis
        # beta1 m + (1 - beta1) g in fp32 from decoded codes, encoded again; the update comes from before that
        x = reference.blockwise.Moments(*moments, torch.float32).adam(
            g, torch.ones_like(g, dtype=torch.bool), step=step + 1, beta1=betas[0], beta2=betas[1], eps=1e-8
        )
        w = (1 - LR * wd) * w - LR * SCALE * (basis @ x if left else x @ basis.T)
        # A neighbouring code of a moment, where sums differ in their last bits, is 2% of an update at most.
        assert (param - w).abs().max() < 0.02 * LR * SCALE * (step + 1)
        torch.testing.assert_close(load(optimizer.state[param], param), basis, rtol=0, atol=2e-5)
    assert (w - start).abs().max() > 10 * 0.02 * LR * SCALE * 8 / 5


@EACH
@DTYPES
def test_resume_in_the_middle_of_a_gap_is_exact(name, dtype):
    """Through torch.load(weights_only=True), with gaps that have grown and queues half full."""
    model = build(dtype)
    optimizer = make(name, model)
    steps_of(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = copy.deepcopy(optimizer.state_dict()["state"])

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed = build(dtype)
    resumed_optimizer = make(name, resumed)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    for i, state in resumed_optimizer.state_dict()["state"].items():
        assert state.keys() == saved[i].keys()
        for key, value in state.items():
            assert not isinstance(value, torch.Tensor) or (value.dtype, value.device) == (saved[i][key].dtype, saved[i][key].device)
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        steps_of(m, o, range(10, 34))
    assert_same(model, resumed)
    assert optimizer.refreshes() == resumed_optimizer.refreshes()


@pytest.mark.parametrize("name", ["galore8bit", "q-galore", "q-galore rotate", "q-galore next"])
@DTYPES
def test_in_backward_is_the_ordinary_step(name, dtype):
    dense, model = build(dtype), build(dtype)
    train(dense, make(name, dense), range(12))
    train(model, make(name, model, "in_backward"), range(12))
    assert_same(dense, model)


@pytest.mark.parametrize("cls", [GaLoreAdamW8bit, QGaLoreAdamW8bit])
def test_four_micro_batches_are_one_batch(cls):
    """Over the first refresh of each basis. Sums differ in their last bits, which moves a code in ten thousand to its neighbour:
    1% of what training moves leaves room for that, and for none of the ways of accumulating that are wrong."""
    one, four, whole = build(), build(), build()
    start = copy.deepcopy(one.state_dict())
    optimizers = [
        optimizer_of(cls, one, "accumulate"),
        optimizer_of(cls, four, "accumulate"),
        optimizer_of(cls, whole, refresh="next"),
    ]
    for model, optimizer, micro in zip((one, four, whole), optimizers, (1, 4, 4)):
        train(model, optimizer, range(6), micro)
    for key, s in start.items():
        p, q, w = (model.state_dict()[key] for model in (one, four, whole))
        assert (p - q).norm() <= 0.01 * (p - s).norm() and (p - w).norm() <= 0.01 * (p - s).norm()
    assert optimizers[0].refreshes().keys() == {"1.weight", "3.weight"}


def test_four_micro_batches_on_an_int4_basis_in_fp32():
    """Without codes of moments, to rounding."""
    one, four = build(), build()
    for model, micro in ((one, 1), (four, 4)):
        optimizer = GaLoreAdamW(groups(model, quant=True), lr=LR, eps=EPS, per_layer="accumulate")
        train(model, optimizer, range(3), micro)
    assert_same(one, four, **CLOSE)


def test_clipping_in_backward_and_by_the_optimizer():
    for per_layer, keys in ((InBackward(max_norm=0.5), {}), ("accumulate", {}), (None, {"refresh": "next"})):
        model = build()
        optimizer = optimizer_of(QGaLoreAdamW8bit, model, per_layer, **keys)
        clip = None if isinstance(per_layer, InBackward) else lambda model, optimizer: optimizer.clip_grad_norm_(0.5)
        norms = train(model, optimizer, range(6), clip=clip)
        assert all(p.isfinite().all() for p in model.parameters()) and (clip is None or (norms > 0).all())


def test_bytes_are_those_of_the_formula():
    m, n, r = 300, 530, 16
    matrix, bias, plain = (nn.Parameter(torch.randn(shape)) for shape in ((m, n), (n,), (100, 50)))
    optimizer = QGaLoreAdamW8bit([{"params": [bias, plain]}, {"params": [matrix], "rank": r}])
    with LiveStorages() as live:
        for p in (matrix, bias, plain):
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p in (matrix, bias, plain):
            p.grad = None
        assert live.bytes == optimizer.memory()["total"] - optimizer.memory()["weights"]
    low_rank = r * n  # m < n: the basis is on the left, its vectors have m entries
    basis, basis_scales = r * m // 2, 2 * 4 * r * 2  # two groups of 256 a vector
    coded, absmaxes = 2 * (low_rank + 5000), 2 * 4 * (r * -(-n // 256) + -(-5000 // 256))  # by row, flat
    counters = 3 * 4 + 8 + 8 + 5 * 4  # steps, countdown, gap, queue
    sums = optimizer.memory()
    assert sums["basis"] == basis
    assert sums["moments"] == coded + 2 * 4 * n  # the bias stays in fp32
    assert sums["scales"] == basis_scales + absmaxes
    assert sums["counters"] == counters + 8 and sums["other"] == 0  # and the counter of skipped weights
    assert optimizer.state_bytes() == basis + basis_scales + coded + 2 * 4 * n + absmaxes + counters
    state = optimizer.state[matrix]
    assert state["basis"].dtype == state["exp_avg"].dtype == torch.uint8 and optimizer.state[bias]["exp_avg"].dtype == torch.float32


@EACH
def test_what_operators_allocated_is_what_the_ledger_says(name):
    model = build()
    optimizer = make(name, model)
    with LiveStorages() as live:
        steps_of(model, optimizer, [0])
        model.zero_grad()
        first = live.bytes
        steps_of(model, optimizer, [1])
        model.zero_grad()
        sums = optimizer.memory()
        assert live.bytes == first == sums["total"] - sums["weights"]
        assert sum(t.numel() * t.element_size() for _, t, in_state in ledger.entries(optimizer) if in_state) == (
            optimizer.state_bytes()
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_gradient_that_is_not_finite(bad, proj_type):
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(60, 70))
    optimizer = QGaLoreAdamW8bit(
        [{"params": [matrix], "rank": 4, "proj_type": proj_type, "subspace": "svd"}], lr=LR, min_8bit_size=0
    )
    matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    before, stored = matrix.detach().clone(), copy.deepcopy(optimizer.state[matrix])
    matrix.grad = torch.randn_like(matrix)
    matrix.grad[3, 5] = bad
    optimizer.step()
    channel = (slice(None), 5) if proj_type == "left" else (3, slice(None))
    assert torch.equal(matrix[channel], before[channel]) and matrix.isfinite().all()
    changed = (matrix != before).any(dim=0 if proj_type == "left" else 1)
    assert changed.sum() == changed.numel() - 1
    assert optimizer.skipped() == matrix[channel].numel()
    for key in ("basis", "basis_scale", "basis_offset"):
        assert torch.equal(optimizer.state[matrix][key], stored[key])


def test_a_refresh_on_a_gradient_that_is_not_finite_keeps_the_bytes():
    """Of a basis in INT4 too, which rounding it again could move; and its moments, gap and queue."""
    param = nn.Parameter(torch.randn(300, 70))
    optimizer = QGaLoreAdamW8bit(
        [{"params": [param], "rank": 8, "update_proj_gap": 1, "moments": "rotate", "proj_type": "left"}], min_8bit_size=0
    )
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[param])
    param.grad.fill_(float("nan"))
    optimizer.step()
    after = optimizer.state[param]
    for key in ("basis", "basis_scale", "basis_offset", "overlaps", "gap"):
        assert torch.equal(after[key], before[key]) or key == "overlaps" and after[key].isnan().all()
    decoded = [torch.ops.lowrank.dequantize_blockwise(s["exp_avg"], s["exp_avg_absmax"], signed=True) for s in (after, before)]
    assert torch.equal(*decoded)


def test_found_inf_is_a_no_op_and_unscaling_is_exact():
    models = [build(), build()]
    optimizers = [optimizer_of(QGaLoreAdamW8bit, m) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: unscaling is exact
    for step in range(3):
        steps_of(models[0], optimizers[0], [step])
        models[1].zero_grad()
        ids = torch.randint(0, 50, (128,), generator=torch.Generator().manual_seed(step))
        scaler.scale(nn.functional.cross_entropy(models[1](ids), ids)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    before, weights = copy.deepcopy(optimizers[1].state_dict()["state"]), copy.deepcopy(models[1].state_dict())
    models[1].head.bias.grad[0] = float("inf")
    scaler.step(optimizers[1])
    assert all(torch.equal(v, weights[k]) for k, v in models[1].state_dict().items())
    for i, state in optimizers[1].state_dict()["state"].items():
        assert all(torch.equal(state[key], before[i][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_the_state_goes_through_bitsandbytes():
    model = build()
    optimizer = optimizer_of(GaLoreAdamW8bit, model)
    steps_of(model, optimizer, range(3))
    kinds = set()
    for param in model.parameters():
        state = optimizer.state[param]
        back = from_bitsandbytes(to_bitsandbytes(state))
        if state["exp_avg"].shape == (16, 96) and state["exp_avg"].dtype == torch.uint8:  # by row: encoded again in flat blocks
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                values = ops.dequantize_blockwise(state[name], state[f"{name}_absmax"], signed=signed)
                codes, absmax = ops.quantize_blockwise(values, signed=signed)
                assert torch.equal(back[name], codes) and torch.equal(back[f"{name}_absmax"], absmax)
            kinds.add("by row")
            continue
        assert all(torch.equal(value, state[key]) for key, value in back.items())
        kinds.add(back["exp_avg"].dtype)
    assert kinds == {torch.uint8, torch.float32, "by row"}


def test_whole_blocks_go_through_bitsandbytes_to_the_bit():
    """Rows of 512: blocks by row are the flat ones, and the state comes back by load_state_dict without a word."""
    param = nn.Parameter(torch.randn(60, 512))
    optimizer = GaLoreAdamW8bit([{"params": [param], "rank": 4}], lr=LR, min_8bit_size=0)
    param.grad = torch.randn_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg_absmax"].shape == (4, 2)
    theirs = to_bitsandbytes(state)
    assert theirs["absmax1"].shape == (8,)
    saved = optimizer.state_dict()
    saved["state"] = {0: {**state, **from_bitsandbytes(theirs)}}
    other = GaLoreAdamW8bit([{"params": [nn.Parameter(param.detach().clone())], "rank": 4}], lr=LR, min_8bit_size=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    (back,) = other.state.values()
    assert all(torch.equal(back[key], state[key]) for key in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"))


def test_one_graph_for_all_steps():
    compiled, eager = build(), build()
    optimizers = [
        QGaLoreAdamW8bit(groups(m, update_proj_gap=3), lr=torch.tensor(LR), min_8bit_size=SMALLEST) for m in (compiled, eager)
    ]
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    step = torch.compile(optimizers[0].step, fullgraph=True, backend=counter)
    for i in range(10):
        for p, q in zip(compiled.parameters(), eager.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        step()
        optimizers[1].step()
    assert counter.frame_count <= 2
    assert_same(compiled, eager)


@pytest.mark.parametrize(
    "cls, keys, options, message",
    [
        (QGaLoreAdamW8bit, {"quant_n_bit": 8}, {}, "quant_n_bit must be 4, got 8"),
        (QGaLoreAdamW8bit, {"quant_group_size": 100}, {}, "quant_group_size must be a power of two from 32 to 1024, got 100"),
        (QGaLoreAdamW8bit, {"cos_threshold": 1.5}, {}, r"cos_threshold must be a number in \[0, 1\] or None, got 1.5"),
        (QGaLoreAdamW8bit, {"gamma_proj": 0.5}, {}, "gamma_proj must be a number of at least 1, got 0.5"),
        (QGaLoreAdamW8bit, {"queue_size": 0}, {}, "queue_size must be an integer of at least 1, got 0"),
        (
            QGaLoreAdamW8bit,
            {"max_update_proj_gap": 3},
            {},
            "max_update_proj_gap must be an integer of at least update_proj_gap = 4, got 3",
        ),
        (GaLoreAdamW8bit, {}, {"min_8bit_size": -1}, "min_8bit_size must be an integer of at least 0, got -1"),
        (GaLoreAdamW8bit, {}, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(cls, keys, options, message):
    with pytest.raises(ValueError, match=message):
        cls(groups(build(), **keys), **options)
    if "quant_n_bit" in keys:
        cls(groups(build(), **keys, quant=False))


@pytest.mark.parametrize(
    "method, keys",
    [(GaLoreAdafactor, {}), (FiraAdamW, {}), (FrugalAdamW, {}), (APOLLOAdamW, {"proj": "svd"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_basis_may_be_in_int4(method, keys):
    model = build()
    before = model[1].weight.detach().clone()
    optimizer = method(groups(model, quant=True, **keys))
    steps_of(model, optimizer, range(6))
    assert optimizer.state[model[1].weight]["basis"].dtype == torch.uint8
    assert model[1].weight.isfinite().all() and not torch.equal(model[1].weight, before)


def test_rows_have_no_basis_to_keep_in_int4():
    with pytest.raises(ValueError, match="quant must be False for GrassAdamW, got True"):
        GrassAdamW(groups(build(), quant=True))


def test_state_of_another_model_is_refused():
    model = build()
    optimizer = optimizer_of(QGaLoreAdamW8bit, model)
    steps_of(model, optimizer, [0])
    other = QGaLoreAdamW8bit(
        param_groups(
            nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 9)),
            rank=8,
            target_modules=["1", "3"],
        )
    )
    with pytest.raises(ValueError, match="does not fit a parameter of shape"):
        other.load_state_dict(optimizer.state_dict())
