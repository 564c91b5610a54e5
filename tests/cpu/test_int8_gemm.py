"""Products in INT8: codes against brute force, C++ against the oracle to the bit, and what quantising costs."""

import pytest
import torch
from cases.case import replace
from test_native_ops import FLOATS, LOW_RANK, inputs
from threads import threads

from lowrank_sys import backends, reference
from lowrank_sys.optim import (
    APOLLOAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GrassAdamW,
    InBackward,
    QGaLoreAdamW8bit,
    param_groups,
)
from lowrank_sys.reference.int8_gemm import quantized

ops = torch.ops.lowrank
# Less and more than a group, a tile and a block on each axis; ranks beyond a group.
SHAPES = [(1, 200, 1), (200, 1, 1), (63, 100, 7), (129, 64, 64), (257, 513, 65), (300, 270, 260), (1100, 1030, 5), (5, 3, 3)]
EMPTY = [(0, 20, 3), (20, 0, 3), (0, 0, 3)]

native = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def same(a, b):
    """Equal, NaN equal to NaN."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    )


def test_codes_of_a_group():
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    x[0, :256], x[1, 256:512], x[2, 512:] = 0.0, 1e-41, 3.0
    codes, scale = quantized(x)
    assert codes.shape == (3, 3, 256) and scale.shape == (3, 3)
    groups = torch.nn.functional.pad(x, (0, 168)).reshape(3, 3, 256)
    assert torch.equal(codes, codes.round()) and codes.abs().amax() == 127
    used = scale > 0
    assert (~used).nonzero().tolist() == [[0, 0], [1, 1]] and not codes[~used].any()
    torch.testing.assert_close(scale[used], (groups.abs().amax(2) / 127)[used], rtol=2**-22, atol=0)
    error = (codes * scale[..., None] - groups).abs()[used]
    assert (error <= scale[used][:, None] * (0.5 + 1e-5)).all()
    assert (codes[2, 2, :88] == 127).all() and not codes[2, 2, 88:].any()


def test_ties_of_a_code_go_to_the_even_one():
    # scale 2⁰ to the bit: 127 times the rounded 1 / 127 is 1
    x = torch.zeros(1, 256)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -3.5])
    codes, scale = quantized(x)
    assert scale.item() == 1.0
    assert codes[0, 0, :6].tolist() == [127, 0, 2, 2, 0, -4]


@native
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_a_step_is_its_products(shape, left):
    """galore_step is project and subspace_step to the bit; that is the oracle's but where X falls beside another code."""
    dtype = FLOATS[sum(shape) % 3]
    args = inputs(*shape, left, dtype)
    got, want = (replace(args, torch.clone) for _ in range(2))
    hyper = dict(step=3, lr=0.1, **LOW_RANK, left=left, int8_gemm=True)
    ops.galore_step(*args, **hyper)
    got[1] = ops.project(got[1], got[2], left=left, int8_gemm=True)
    ops.subspace_step(*got, **hyper)
    assert all(same(args[i], got[i]) for i in (0, 3, 4))

    reference.named("galore_step")(*want, **hyper)
    for i in (3, 4):
        torch.testing.assert_close(args[i], want[i], rtol=2**-20, atol=1e-7)
    # One code of X is worth its largest entry over 127, times the basis' largest.
    size = 40 * 0.025 / 127 * want[2].abs().amax().item() if want[2].numel() else 0.0
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    off = (args[0].float() - want[0].float()).abs()
    assert (off <= rounding * (want[0].float().abs() + 1) + 2 * size).all()
    channels = off.amax(0 if left else 1) if off.numel() else off
    assert (channels > rounding * (want[0].float().abs().amax() if off.numel() else 0) + 1e-6).sum() <= 0.05 * channels.numel() + 1


@native
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite(value, left):
    """It makes its own channel of R NaN, whichever group it is in, and no other; one of the basis makes all of them NaN."""
    _, grad, basis, _, _ = inputs(700, 600, 9, left)
    where = (650, 30) if left else (30, 550)
    grad[where] = value
    r = ops.project(grad, basis, left=left, int8_gemm=True)
    bad = r.isnan().all(0 if left else 1)
    assert bad.nonzero().flatten().tolist() == [30] and r.isnan().sum() == 9
    basis[-1, 4] = value
    r = ops.project(torch.ones_like(grad), basis, left=left, int8_gemm=True)
    assert (r if left else r.T)[4].isnan().all() and r.isnan().sum() == r.numel() // 9


@native
@pytest.mark.parametrize("left", [True, False])
def test_zeros_and_denormals(left):
    param, grad, basis, x, _ = inputs(40, 300, 6, left)
    for tiny in (0.0, 1e-42):
        assert not ops.project(torch.full_like(grad, tiny), basis, left=left, int8_gemm=True).any()
        want = param.clone()
        ops.back_project_(param, torch.full_like(x, tiny), basis, left=left, int8_gemm=True)
        assert torch.equal(param, want)


@native
@pytest.mark.parametrize("left", [True, False])
def test_the_error_of_gaussian_matrices(left):
    """About 1%: two operands, each off by 1/127 of a group's largest over sqrt(12). A step of fp32's is exact beside that."""
    param, grad, basis, x, _ = inputs(1024, 768, 64, left)
    r = grad.double()
    r = basis.double().T @ r if left else r @ basis.double()
    off = (ops.project(grad, basis, left=left, int8_gemm=True) - r).norm() / r.norm()
    assert 0.002 < off < 0.012
    back = basis.double() @ x.double() if left else x.double() @ basis.double().T
    got = torch.zeros_like(param)
    ops.back_project_(got, x, basis, left=left, int8_gemm=True)
    assert 0.002 < (got - back).norm() / back.norm() < 0.012


@native
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_do_not_change_a_bit(dtype, left):
    results = []
    for count in (1, 2, 3, 5):
        args = inputs(1100, 1030, 20, left, dtype)
        args[1][3, 7] = torch.nan
        with threads(count):
            ops.galore_step(*args, step=2, lr=0.1, left=left, int8_gemm=True, **LOW_RANK)
        results.append(args)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other))


# --- the optimizer


def train(steps=60, **keys):
    """Losses of a small regression whose gradients need a subspace."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 320), torch.nn.Tanh(), torch.nn.Linear(320, 32))
    x = torch.randn(256, 96, generator=generator)
    y = torch.randn(256, 32, generator=generator)
    optimizer = GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=20, scale=1.0, **keys), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_it_trains_as_fp32_does():
    (want, model), (got, other) = train(), train(int8_gemm=True)
    assert want[-1] < 0.8 * want[0]
    assert abs(got[-1] - want[-1]) < 0.02 * want[0]
    assert not torch.equal(model[0].weight, other[0].weight), "the key has no effect"


@pytest.mark.parametrize("mode", ["accumulate", "in_backward"])
def test_per_layer_projects_in_int8_too(mode, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 24))
    groups = param_groups(model, rank=4, int8_gemm=True)
    optimizer = GaLoreAdamW(groups, per_layer=InBackward(max_norm=1.0) if mode == "in_backward" else mode)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "int8_gemm" in (names := {a.name for a in function._schema.arguments}) and names:
                seen.append((function._schema.name, (kwargs or {}).get("int8_gemm", False)))
            return function(*args, **(kwargs or {}))

    with Spy():
        for _ in range(2):
            model(torch.randn(8, 24)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    products = [flag for name, flag in seen if name == "lowrank::step"]
    assert products and all(products)
    projections = [flag for name, flag in seen if name == "lowrank::project"]
    assert any(projections)


@pytest.mark.parametrize("optimizer", [GaLoreAdamW8bit, QGaLoreAdamW8bit, GaLoreAdafactor, APOLLOAdamW, GrassAdamW])
def test_who_cannot_says_so(optimizer):
    model = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match=f"int8_gemm must be False for {optimizer.__name__}, got True"):
        optimizer(param_groups(model, rank=4, int8_gemm=True))
    optimizer(param_groups(model, rank=4, int8_gemm=False))


def test_not_with_a_basis_in_int4():
    with pytest.raises(ValueError, match="int8_gemm must be False with quant"):
        GaLoreAdamW(param_groups(torch.nn.Linear(16, 16), rank=4, int8_gemm=True, quant=True))


def test_a_checkpoint_without_the_key():
    model = torch.nn.Linear(16, 16)
    optimizer = GaLoreAdamW(param_groups(model, rank=4))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.pop("int8_gemm", None)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["int8_gemm"] is False
