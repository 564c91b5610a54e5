"""The step in parts, of which a CUDA graph holds the body: the same bits, no host read, no address that moves."""

import pytest
import torch
from cases.case import same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_sys.memory.live import READS
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
from lowrank_sys.optim.captured import StepInParts, _expect_same, _given

STEPS, GAP = 30, 13  # two refreshes and more of every matrix


def build(int8=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64))
    return quantize_model(model, group_size=32) if int8 else model


def made(model, optimizer=GaLoreAdamW, lr=1e-2, gap=GAP, options=None, **keys):
    return optimizer(param_groups(model, rank=8, update_proj_gap=gap, **keys), lr=lr, **(options or {}))


METHODS = {
    "galore": {},
    "galore next": {"refresh": "next", "moments": "rotate"},
    "galore svd reset": {"subspace": "svd", "moments": "reset"},
    "galore int8_gemm": {"int8_gemm": True},
    "galore 8-bit": {"optimizer": GaLoreAdamW8bit, "options": {"min_8bit_size": 0}},
    "galore adafactor": {"optimizer": GaLoreAdafactor, "options": {"relative_step": False, "scale_parameter": False}},
    "q-galore": {"optimizer": QGaLoreAdamW8bit},
    "q-galore int8": {"optimizer": QGaLoreAdamW8bit, "int8": True},
    "apollo": {"optimizer": APOLLOAdamW},
    "fira": {"optimizer": FiraAdamW},
    "fira int8": {"optimizer": FiraAdamW, "int8": True},
    "frugal": {"optimizer": FrugalAdamW},
    "grass": {"optimizer": GrassAdamW},
    "grass sampled": {"optimizer": GrassAdamW, "subspace": "sample"},
}


def pair(method):
    keys = dict(METHODS[method])
    int8 = keys.pop("int8", False)
    models = build(int8), build(int8)
    return models, [made(model, **keys) for model in models]


def set_gradients(model, step, poison=None):
    """In place: addresses stay."""
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(model.parameters()):
        grad = torch.randn(param.shape, generator=generator)
        if i == poison:
            grad.view(-1)[7] = float("nan")
        param.grad = grad if param.grad is None else param.grad.copy_(grad)


def same(models, optimizers):
    tensors = [
        (*model.state_dict().values(), *(v for p in model.parameters() for v in optimizer.state[p].values()))
        for model, optimizer in zip(models, optimizers)
    ]
    return all(same_bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_are_the_step_to_the_bit(method):
    models, optimizers = pair(method)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    parts = StepInParts(optimizers[1], torch.device("cpu"))
    for step in range(STEPS):
        for model in models:
            set_gradients(model, step, poison=0 if step == 4 else None)
        optimizers[0].step()
        for part in (parts.before, parts.body, parts.after):
            with torch.no_grad():
                part()
        optimizers[1]._opt_called = True
        for schedule in schedules:
            schedule.step()
    assert same(models, optimizers)
    assert optimizers[0].skipped() == optimizers[1].skipped()


def test_a_grad_scalers_numbers():
    models, optimizers = pair("galore")
    parts = StepInParts(optimizers[1], torch.device("cpu"))
    for step in range(6):
        for model in models:
            set_gradients(model, step)
        found_inf, grad_scale = torch.tensor(float(step == 3)), torch.tensor(2.0**step)
        optimizers[0].found_inf, optimizers[0].grad_scale = found_inf, grad_scale
        optimizers[0].step()
        with torch.no_grad():
            parts.before(grad_scale=grad_scale, found_inf=found_inf)
            parts.body()
            parts.after()
    assert same(models, optimizers)


class Watch(TorchDispatchMode):
    """Fails where the host reads a value; counts what was called."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads a value on the host"
        self.calls += 1
        return func(*args, **kwargs or {})


def addresses(model, optimizer):
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *optimizer.counters.values()]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize("method", METHODS)
def test_the_body_reads_nothing_and_moves_nothing(method):
    (model, _), (optimizer, _) = pair(method)
    parts = StepInParts(optimizer, torch.device("cpu"))
    where = None
    with torch.no_grad():
        for step in range(STEPS):
            set_gradients(model, step)
            parts.before()
            with Watch() as watch:
                parts.body()
            parts.after()
            where = where or addresses(model, optimizer)
            assert addresses(model, optimizer) == where
            assert watch.calls > 0
    with pytest.raises(AssertionError, match="reads a value on the host"), Watch():
        torch.ones(()).item()


@pytest.mark.parametrize(
    "build_step, message",
    [
        (
            lambda model: torch.optim.AdamW(model.parameters()),
            "optimizer must be one of lowrank_sys.optim to be captured, got AdamW",
        ),
        (lambda model: made(model), "optimizer must have all parameters on one CUDA device to be captured, got cpu"),
        (lambda model: made(model, options={"per_layer": "accumulate"}), "must have per_layer=None to be captured, got Accumulate"),
        (
            lambda model: made(model, options={"per_layer": "in_backward"}),
            "must have per_layer=None to be captured, got InBackward",
        ),
        (lambda model: made(model, options={"nonfinite": "raise"}), "must have nonfinite='skip' to be captured, got 'raise'"),
    ],
    ids=["peer", "cpu", "accumulate", "in_backward", "raise"],
)
def test_what_cannot_be_captured(build_step, message):
    with pytest.raises(ValueError, match=message) as error:
        CapturedStep(build_step(build()))
    assert "\n" not in str(error.value)


def test_step_hooks_are_refused():
    optimizer = made(build())
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="must have no step hooks to be captured"):
        CapturedStep(optimizer)


def replaced(model, optimizer):
    model[0].weight.grad = model[0].weight.grad.clone()


def dropped(model, optimizer):
    optimizer.zero_grad()


def moved(model, optimizer):
    model[2].weight.data = model[2].weight.data.clone()


def decayed(model, optimizer):
    optimizer.param_groups[1]["weight_decay"] = 0.5


def grown(model, optimizer):
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(3)))]})


@pytest.mark.parametrize(
    "change, message",
    [
        (replaced, r"the gradient of 0.weight moved .* zero_grad\(set_to_none=False\)"),
        (dropped, "the gradient of .* is gone"),
        (moved, "the weight of 2.weight moved"),
        (decayed, "weight_decay of group 1 was 0.0 when the step was captured, got 0.5"),
        (grown, "began with 6 parameters, got 7"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_changed_since_the_capture_is_named(change, message):
    model = build()
    optimizer = made(model)
    set_gradients(model, 0)
    before = _given(optimizer, (None, None))
    optimizer.param_groups[1]["lr"] = 0.5
    set_gradients(model, 1)
    optimizer.zero_grad(set_to_none=False)
    _expect_same(optimizer, before, _given(optimizer, (None, None)))
    with pytest.raises(RuntimeError, match="without a GradScaler"):
        _expect_same(optimizer, before, _given(optimizer, (torch.tensor(0.0), None)))
    change(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        _expect_same(optimizer, before, _given(optimizer, (None, None)))
