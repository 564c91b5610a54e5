"""Averages, copies and initialisations of models with INT8 weights: by the values of their codes, or one error."""

import copy
import io

import pytest
import torch
from small_model import backward, build, groups, loss_of, tokens, train
from test_averages import KINDS
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowrank_sys.nn import dequantize_model, is_quantized, quantize_model
from lowrank_sys.optim import GaLoreAdamW, QGaLoreAdamW8bit


def int8_model(dtype=torch.float32):
    return quantize_model(build(dtype), group_size=32)


def values(model):
    with torch.no_grad():
        return {name: p.double() for name, p in model.named_parameters() if "low_rank_gradients" not in name}


def codes_of(layer):
    return layer.codes.clone(), layer.scale.clone()


def same_codes(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("optimizer_class", [QGaLoreAdamW8bit, GaLoreAdamW])
@pytest.mark.parametrize("per_layer", [None, "accumulate", "in_backward"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("buffers", "by hand")])
def test_an_average_is_that_of_the_values(kind, when, per_layer, optimizer_class):
    made, (first, then) = KINDS[kind]
    model = int8_model()
    average = made(model) if when == "before" else None
    optimizer = optimizer_class(groups(model), lr=1e-2, per_layer=per_layer)
    average = average or made(model)
    seen = [values(model)]
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        seen.append(values(model))
    for name, found in values(average.module).items():
        wanted = first([value[name] for value in seen])
        for count, value in enumerate(seen[2:], start=2):
            wanted = then(wanted, value[name], count)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0, msg=lambda m: f"{name}: {m}")
    for name, layer in average.module.named_modules():
        if is_quantized(getattr(layer, "weight", None)):
            rounded = layer.dequantized().double()
            half = layer.scale.double().repeat_interleave(32, 1)[:, : layer.in_features] / 2
            assert ((rounded - values(average.module)[f"{name}.weight"]).abs() <= 1.001 * half).all()
    assert not same_codes(codes_of(average.module[1]), codes_of(model[1]))
    assert loss_of(average.module, tokens(9)).isfinite()


def test_small_steps_are_not_lost():
    """A step of 1/1000 is far below half a code: rounded each time, the average would stay where it began."""
    model, target = int8_model(), int8_model()
    with torch.no_grad():
        target[1].weight.add_(0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)
    start, end = values(model)["1.weight"], values(target)["1.weight"]
    for _ in range(1000):
        average.update_parameters(target)
    wanted = end + 0.999**1000 * (start - end)
    torch.testing.assert_close(values(average.module)["1.weight"], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(average.module[1].dequantized().double(), wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_and_dense_averages(dtype):
    """Whatever holds values of its own gets those of the codes."""
    model = int8_model(dtype)
    dense = dequantize_model(copy.deepcopy(model))
    for p, q in zip(model.parameters(), dense.parameters()):
        for read in (
            p.detach().clone(),
            p.data.clone(),
            p.detach().cpu(),
            p.transpose(0, -1).transpose(0, -1),
            p.view(-1).view(p.shape),
            p.data.to(p.dtype) + 0,
        ):
            assert read.dtype == dtype and torch.equal(read, q)
        assert torch.equal(torch.zeros_like(q).copy_(p.detach()), q)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), nn.utils.parameters_to_vector(dense.parameters()))
    for p, q in zip(copy.deepcopy(dense).parameters(), model.parameters()):
        assert torch.equal(p.detach().zero_().lerp_(q, 1.0), q.detach().clone())


def test_a_list_on_the_cpu_is_saved_as_tensors():
    model, file = int8_model(), io.BytesIO()
    torch.save({name: p.detach().cpu() for name, p in model.named_parameters() if name == "1.weight"}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["1.weight"], model[1].dequantized())


def test_the_first_copy_is_exact():
    model, other = int8_model(), int8_model()
    train(model, QGaLoreAdamW8bit(groups(model), lr=1e-2), range(2))
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters()):
            p.data.copy_(q)
    assert same_codes(codes_of(model[1]), codes_of(other[1])) and not other[1].weight._exact
    assert torch.equal(model(tokens(0)), other(tokens(0)))


@pytest.mark.parametrize(
    "write",
    [
        lambda p, new: p.data.copy_(new),
        lambda p, new: setattr(p, "data", new),
        lambda p, new: torch._foreach_copy_([p], [new]),
        lambda p, new: p.detach().zero_().add_(new),
        lambda p, new: p.data.__setitem__(slice(None), new),
        lambda p, new: nn.utils.vector_to_parameters(new.flatten(), [p]),
    ],
)
def test_values_are_written_into_the_codes(write):
    """And an optimizer goes on from them, with nothing left of what the codes lack."""
    model, other = int8_model(), int8_model()
    optimizers = [QGaLoreAdamW8bit(groups(m), lr=1e-2) for m in (model, other)]
    new = torch.randn(96, 48, generator=torch.Generator().manual_seed(1)) / 5
    with torch.no_grad():
        write(model[1].weight, new)
    other[1].quantize_(new)
    torch.testing.assert_close(model[1].weight.detach().clone(), new, atol=1e-6, rtol=0)
    for m, o in zip((model, other), optimizers):
        train(m, o, range(2))
    assert same_codes(codes_of(model[1]), codes_of(other[1]))
    assert torch.equal(model[1].weight.detach().clone(), other[1].dequantized())


@pytest.mark.parametrize("initialise", [nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.trunc_normal_, nn.init.ones_])
def test_initialisation(initialise):
    model = int8_model()
    torch.manual_seed(3)
    initialise(model[3].weight)
    torch.manual_seed(3)
    wanted = initialise(torch.empty(48, 96))
    torch.testing.assert_close(model[3].weight.detach().clone(), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(model[3].dequantized(), wanted, atol=wanted.abs().max().item() / 100, rtol=0)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.view(-1).mul_(2),
        lambda p: p.data[0].zero_(),
        lambda p: p.detach().T.copy_(torch.ones(48, 96)),
        lambda p: p.data.chunk(2)[0].fill_(1),
        lambda p: nn.init.orthogonal_(p),
    ],
)
def test_a_view_is_read_only(write):
    model = int8_model()
    before = codes_of(model[1])
    with torch.no_grad(), pytest.raises(RuntimeError, match="a view of a quantized weight cannot be written: write into"):
        write(model[1].weight)
    assert same_codes(codes_of(model[1]), before)


def test_gradients_of_a_penalty_reach_the_handle():
    model = int8_model()
    sum(p.square().sum() for p in model.parameters()).backward()
    torch.testing.assert_close(model[1].weight.grad, 2 * model[1].dequantized())


def test_asking_costs_nothing():
    """Shapes, gradients, hooks and clipping leave the codes alone, and no value is made."""
    model = int8_model()
    weight = model[1].weight
    backward(model, 0)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    with _Ops() as ops:
        weight.register_hook(lambda grad: grad)
        weight.requires_grad_(True)
        assert weight.numel() == 96 * 48 and weight.dim() == 2 and weight.is_floating_point() and len({weight}) == 1
        assert weight.grad.shape == torch.zeros_like(weight).shape and weight.to(torch.float32) is weight
        assert weight.detach().untyped_storage().nbytes() == 4
    assert not any("lowrank" in name for name in ops.names)


class _Ops(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def an_average(**keys):
    """Of two models 0.05 apart, with its values."""
    model = int8_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), **keys)
    average.update_parameters(model)
    with torch.no_grad():
        model[1].weight.add_(0.05)
    average.update_parameters(model)
    return average, average.module[1].weight.detach().clone()


def reloaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def from_its_state(module):
    made = int8_model()
    with torch.no_grad():
        made[1].weight.mul_(2)
    made.load_state_dict(module.state_dict())
    return made


@pytest.mark.parametrize("keys", [{}, {"use_buffers": True}], ids=["", "use_buffers"])
@pytest.mark.parametrize(
    "take", [copy.deepcopy, reloaded, from_its_state, lambda m: m.to("cpu"), lambda m: m.train(), lambda m: quantize_again(m)]
)
def test_the_codes_follow_the_average(take, keys):
    """torch copies the model's buffers over the average's, or averages them: whatever looks at the codes finds the average."""
    average, wanted = an_average(**keys)
    taken = take(average.module)
    torch.testing.assert_close(taken[1].dequantized(), wanted, atol=5e-3, rtol=0)
    torch.testing.assert_close(taken[1].weight.detach().clone(), wanted, atol=5e-3, rtol=0)
    with torch.no_grad():
        x = torch.randn(7, 48)
        torch.testing.assert_close(taken[1](x), nn.functional.linear(x, taken[1].dequantized(), taken[1].bias), atol=1e-5, rtol=0)


def test_an_average_is_put_into_a_model():
    average, wanted = an_average()
    model = int8_model()
    for p, q in zip(model.parameters(), average.module.parameters()):
        p.data.copy_(q)
    torch.testing.assert_close(model[1].dequantized(), wanted, atol=5e-3, rtol=0)
    assert same_codes(codes_of(model[1]), codes_of(average.module[1]))
    before = codes_of(model[1])
    train(model, QGaLoreAdamW8bit(groups(model), lr=1e-2), [0])
    assert not same_codes(codes_of(model[1]), before)


def quantize_again(module):
    return quantize_model(dequantize_model(module), group_size=32)


def test_a_compiled_average():
    torch._dynamo.reset()
    average, _ = an_average()
    model, layer = int8_model(), average.module[1]
    x = torch.randn(7, 48)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            found = compiled(x)
            torch.testing.assert_close(found, nn.functional.linear(x, layer.dequantized(), layer.bias), atol=1e-5, rtol=0)
            average.update_parameters(model)
