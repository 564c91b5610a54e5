"""CapturedStep on the device: the same bits as the eager step, nothing waits, and replays take no memory."""

import pytest
import torch
from torch import nn

from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import (
    APOLLOAdamW,
    CapturedStep,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GrassAdamW,
    QGaLoreAdamW8bit,
    param_groups,
)

WIDTH, STEPS, GAP = 256, 30, 11

METHODS = {
    "galore": (GaLoreAdamW, {}, {}),
    "galore next rotate": (GaLoreAdamW, {"refresh": "next", "moments": "rotate"}, {}),
    "galore int8_gemm": (GaLoreAdamW, {"int8_gemm": True}, {}),
    "galore 8-bit": (GaLoreAdamW8bit, {}, {}),
    "galore adafactor": (GaLoreAdafactor, {}, {"relative_step": False, "scale_parameter": False}),
    "q-galore": (QGaLoreAdamW8bit, {"cos_threshold": None}, {}),
    "q-galore int8": (QGaLoreAdamW8bit, {"cos_threshold": None}, {}),
    "apollo": (APOLLOAdamW, {}, {}),
    "apollo int8": (APOLLOAdamW, {}, {"plain_8bit": True}),
    "fira": (FiraAdamW, {}, {}),
    "frugal": (FrugalAdamW, {}, {}),
    "grass": (GrassAdamW, {}, {}),
}
EACH = pytest.mark.parametrize("method", METHODS)


def build(method, dtype=torch.bfloat16):
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.LayerNorm(WIDTH)).to("cuda", dtype)
    model = quantize_model(model) if "int8" in method.split() else model
    make, keys, options = METHODS[method]
    return model, make(param_groups(model, rank=16, update_proj_gap=GAP, **keys), lr=1e-2, **options)


def set_gradients(model, step, poison=False):
    """In place: addresses stay."""
    generator = torch.Generator(device="cuda").manual_seed(step)
    for i, param in enumerate(model.parameters()):
        grad = torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype)
        if poison and i == 0:
            grad.view(-1)[7] = float("nan")
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def held(model, optimizer):
    """All that a run consists of."""
    state = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *state)]


def same(a, b):
    return all(torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True))


def halved(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


@EACH
def test_captured_is_eager_to_the_bit(method):
    (eager, optimizer), (model, other) = build(method), build(method)
    step, schedules = CapturedStep(other), (halved(optimizer), halved(other))
    for i in range(STEPS):
        set_gradients(eager, i, poison=i == 5)
        set_gradients(model, i, poison=i == 5)
        optimizer.step()
        step.step()
        for schedule in schedules:
            schedule.step()
    assert same(held(eager, optimizer), held(model, other))
    assert optimizer.skipped() == other.skipped()


@EACH
def test_nothing_waits_and_no_memory_grows(method):
    model, optimizer = build(method)
    step = CapturedStep(optimizer)
    for i in range(GAP + 2):  # eager, captured, replayed, every refresh once
        set_gradients(model, i)
        step.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * GAP):
            optimizer.param_groups[1]["lr"] *= 0.9
            step.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_grad_scaler_takes_it_for_the_optimizer():
    runs = []
    for captured in (False, True):
        model, optimizer = build("galore", torch.float32)
        step = CapturedStep(optimizer) if captured else optimizer
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for i in range(8):
            set_gradients(model, i, poison=i == 4)
            scaler.scale(torch.ones((), device="cuda"))
            scaler.step(step)
            scaler.update()
        runs.append(held(model, optimizer))
    assert same(*runs)


def test_a_loaded_state_is_captured_anew():
    (eager, optimizer), (model, other) = build("galore"), build("galore")
    step = CapturedStep(other)
    for i in range(8):
        set_gradients(eager, i)
        set_gradients(model, i)
        optimizer.step()
        step.step()
        if i == 3:
            other.load_state_dict(other.state_dict())
    assert same(held(eager, optimizer), held(model, other))


def test_a_gradient_that_moved_is_an_error():
    model, optimizer = build("galore")
    step = CapturedStep(optimizer)
    for i in range(3):
        set_gradients(model, i)
        step.step()
    model[0].weight.grad = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"the gradient of 0.weight moved .* zero_grad\(set_to_none=False\)"):
        step.step()
    with pytest.raises(ValueError, match="set_to_none must be False"):
        step.zero_grad(set_to_none=True)
