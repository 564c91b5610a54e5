"""Every method on fake tensors of a GPU, which hold nothing: an op that mixes devices fails, and waits of the host are seen."""

from collections import Counter

import pytest
import torch
from lanes import usual
from methods.test_presets import METHODS, preset
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowrank_sys.memory import live
from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import GaLoreAdamW, param_groups

SHAPES = (24, 40), (40, 24)
WAYS = {"float": {}, "in_backward": {"per_layer": "in_backward"}, "numbers": {"numbers": True}, "int8": {"int8": True}}
# What makes the host wait beside a read of a value.
WAITING = {"nonzero", "masked_select", "_unique2", "_linalg_svd", "_linalg_eigh"}
# A singular value decomposition of a matrix (2r, 2r) in every step.
SOLVED = {"mofasgd": {"_linalg_svd": len(SHAPES)}}


class Waits(live.LiveStorages):
    """Counts by operator, while `on`, what makes the host wait for the GPU."""

    def __init__(self, fake):
        super().__init__(cuda=True, fake=fake)
        self.on, self.counted = False, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.on and waits(func, args, kwargs or {}):
            self.counted[func.__name__.split(".")[0]] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def waits(func, args, kwargs):
    name = func.__name__.split(".")[0]
    if name == "_to_copy":
        return "device" in kwargs and on_gpu(args[0]) != (torch.device(kwargs["device"]).type == "cuda")
    if name == "copy_":
        return on_gpu(args[0]) != on_gpu(args[1])
    return on_gpu(args[0]) if func in live.READS or name in WAITING else False


def on_gpu(tensor):
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


@pytest.fixture
def no_driver(monkeypatch):
    """Without one there are neither generators nor pinned memory of a GPU; and nothing is remembered of an op that was seen."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    monkeypatch.setattr(live, "_signature", lambda *_: None)


def layers(int8):
    """Layers, each on a GPU of its own."""
    made = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=False, device=f"cuda:{i}") for i, (m, n) in enumerate(SHAPES)))
    return quantize_model(made, group_size=32) if int8 else made


def backward(weights):
    """Gradients, and the hooks that take them."""
    for weight in weights:
        weight.grad = torch.empty(weight.shape, device=weight.device)
        for hook in list((weight._post_accumulate_grad_hooks or {}).values()):
            hook(weight)


@pytest.mark.parametrize("way", usual(["float"], *(way for way in WAYS if way != "float")))
@pytest.mark.parametrize("name", METHODS)
def test_a_step_mixes_no_devices_and_waits_for_nothing(no_driver, name, way):
    options = dict(WAYS[way])
    numbers = options.pop("numbers", False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Waits(fake) as seen:
        weights = list(layers(options.pop("int8", False)).parameters())
        optimizer = preset(name, weights, **options)
        if numbers:  # GradScaler's and the rate, on the first GPU
            optimizer.grad_scale, optimizer.found_inf = torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:0")
            optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda:0")
        for left in (None, 0, 9):  # two steps choose bases, the third one does not
            for state in optimizer.state.values() if left is not None else ():
                if "countdown" in state:
                    state["countdown"] = torch.tensor(left, device="cpu")
            seen.on = left == 9
            backward(weights)
            optimizer.step()
        seen.on = False
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.load_state_dict(optimizer.state_dict())
    assert seen.counted == SOLVED.get(name, {})


@pytest.mark.parametrize("per_layer", [None, "accumulate"])
def test_one_norm_of_gradients_on_two_gpus(no_driver, per_layer):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Waits(fake) as seen:
        model = layers(int8=False)
        weights = list(model.parameters())
        optimizer = GaLoreAdamW(param_groups(model, rank=3, refresh="next"), lr=1e-2, per_layer=per_layer)
        for seen.on in (False, True):
            backward(weights)
            assert optimizer.clip_grad_norm_(1.0).device == weights[0].device
            optimizer.step()
            optimizer.zero_grad()
    assert seen.counted == {}


def test_a_wait_and_a_mixture_are_seen(no_driver):
    with FakeTensorMode() as fake, Waits(fake) as seen:
        here, there = torch.empty(3), torch.empty(3, device="cuda")
        seen.on = True
        float(there.sum())
        there.cpu()
        there.copy_(here)
        assert seen.counted == {"_local_scalar_dense": 1, "_to_copy": 1, "copy_": 1}
        with pytest.raises(RuntimeError, match="device"):
            here + there
