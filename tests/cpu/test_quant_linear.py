"""QuantLinear and its weight's handle, against nn.Linear over the dequantized weight."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.nn import QuantLinear, QuantWeight, is_quantized

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(256, 64), (300, 70), (33, 5)]  # whole groups, a short last one, less than one


def layers(n=300, m=70, *, bias=True, dtype=torch.float32, group_size=256):
    """A QuantLinear, and nn.Linear in fp64 over the same values."""
    torch.manual_seed(0)
    quantized = QuantLinear.from_linear(nn.Linear(n, m, bias=bias, dtype=dtype), group_size)
    exact = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    exact.weight.data = quantized.dequantized(torch.float32).double()
    if bias:
        exact.bias.data = quantized.bias.detach().double()
    return quantized, exact


def backward(layer, x, seed=1):
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape).to(torch.bfloat16).to(y.dtype))  # the same numbers in every type
    grads = (x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    layer.zero_grad()
    return [t for t in (y.detach(), *grads) if t is not None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_and_gradients_are_those_of_a_linear_layer(shape, bias, dtype):
    n, m = shape
    quantized, exact = layers(n, m, bias=bias, dtype=dtype)
    torch.manual_seed(2)
    x = torch.randn(2, 9, n).to(torch.bfloat16)
    for got, want in zip(backward(quantized, x.to(dtype)), backward(exact, x.double()), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        # One rounding of the result, and fp32 sums of at most 300 terms, each off by 2^-24 of the sum of magnitudes.
        bound = torch.finfo(dtype).eps * want.abs() + 300 * 2**-23 * want.abs().max()
        assert ((got.double() - want).abs() <= bound).all()


def test_the_gradient_is_the_plain_layers_to_the_bit():
    quantized, _ = layers()
    plain = nn.Linear(300, 70)
    plain.load_state_dict({"weight": quantized.dequantized(), "bias": quantized.bias.detach()})
    x = torch.randn(4, 300)
    assert torch.equal(backward(quantized, x)[2], backward(plain, x)[2])


def test_the_handle_takes_no_memory():
    quantized, _ = layers()
    weight = quantized.weight
    assert isinstance(weight, QuantWeight) and isinstance(weight, nn.Parameter) and is_quantized(weight)
    assert weight.shape == (70, 300) and weight.dtype == torch.float32 and weight.requires_grad and weight.is_leaf
    assert weight.untyped_storage().nbytes() == 4
    assert weight.codes is quantized.codes and weight.scale is quantized.scale and weight.group_size == 256
    assert weight.scale.shape == (70, 2)
    assert not is_quantized(nn.Parameter(torch.zeros(2))) and not is_quantized(quantized.bias)
    assert [name for name, _ in quantized.named_parameters()] == ["weight", "bias"]


def test_a_handle_of_its_own():
    codes, scale = torch.ops.lowrank.quantize_int8(torch.randn(4, 64), group_size=32)
    weight = QuantWeight(codes, scale, group_size=32, dtype=torch.bfloat16, requires_grad=False)
    assert weight.codes is codes and weight.scale is scale and weight.dtype == torch.bfloat16 and not weight.requires_grad
    copied = copy.deepcopy(weight)
    assert torch.equal(copied.codes, codes) and copied.codes is not codes and copied.group_size == 32


def test_gradients_accumulate_and_hooks_see_them():
    quantized, exact = layers()
    seen = []
    quantized.weight.register_post_accumulate_grad_hook(lambda p: seen.append((p is quantized.weight, p.grad.shape)))
    x = torch.randn(3, 300)
    quantized(x).sum().backward()
    first = quantized.weight.grad.clone()
    quantized(x).sum().backward()
    assert seen == [(True, (70, 300))] * 2
    assert torch.equal(quantized.weight.grad, 2 * first)


def test_a_hook_may_write_the_codes_in_backward():
    quantized, exact = layers()
    x = torch.randn(3, 300, requires_grad=True)

    def overwrite(weight):
        weight.codes.zero_()

    quantized.weight.register_post_accumulate_grad_hook(overwrite)
    quantized(x).sum().backward()
    want = exact.weight.sum(0)
    assert (x.grad.double() - want).abs().max() <= 70 * 2**-23 * exact.weight.abs().sum(0).max()
    assert not quantized.codes.any()


def test_codes_written_between_forward_and_backward_are_an_error():
    quantized, _ = layers()
    y = quantized(torch.randn(3, 300))
    quantized.codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", ["weight", "x", "nothing"])
def test_only_needed_gradients_are_made(training):
    quantized, _ = layers(bias=False)
    quantized.weight.requires_grad_(training == "weight")
    x = torch.randn(512, 300, requires_grad=training == "x")
    with LiveStorages() as live:
        y = quantized(x)
        if training == "nothing":
            assert not y.requires_grad
            return
        del x  # saved for the weight's gradient, and for nothing else
        before = live.bytes
        y.sum().backward()
    made = 4 * {"weight": 70 * 300, "x": 512 * 300}[training]
    assert (quantized.weight.grad is not None) == (training == "weight")
    # the sum and its gradient, that made contiguous, and the scratch of the products
    assert made <= live.peak - before <= made + 4 * (2 + 512 * 70 + 70 * 300)


def test_x_is_not_kept_for_a_frozen_weight():
    quantized, _ = layers()
    quantized.requires_grad_(False)
    kept = []
    x = torch.randn(7, 300, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        quantized(x)
        assert (7, 300) not in kept
        quantized.weight.requires_grad_(True)
        quantized(x)
        assert (7, 300) in kept


@pytest.mark.parametrize("shape", [(300,), (0, 300), (2, 0, 300), (2, 3, 4, 300)], ids=str)
def test_any_number_of_rows(shape):
    quantized, exact = layers()
    for got, want in zip(backward(quantized, torch.randn(shape)), backward(exact, torch.zeros(shape).double())):
        assert got.shape == want.shape
    assert torch.isfinite(backward(quantized, torch.ones(shape))[2]).all()


def test_rows_with_strides():
    quantized, _ = layers()
    x = torch.randn(300, 6)
    for got, want in zip(backward(quantized, x.T), backward(quantized, x.T.contiguous())):
        assert torch.equal(got, want)


def test_autocast_casts_x_as_for_a_plain_layer():
    quantized, _ = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(torch.randn(3, 300))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert quantized.weight.grad.dtype == torch.float32 and quantized.bias.grad.dtype == torch.float32


def test_moving_and_casting_keep_the_handle():
    quantized, _ = layers()
    weight, codes, scale = quantized.weight, quantized.codes.clone(), quantized.scale.clone()
    quantized(torch.randn(2, 300)).sum().backward()
    for cast, dtype in (
        (lambda q: q.half(), torch.float16),
        (lambda q: q.to(torch.bfloat16), torch.bfloat16),
        (lambda q: q.type(torch.float16), torch.float16),
        (lambda q: q.float(), torch.float32),
        (lambda q: q.share_memory(), torch.float32),
        (lambda q: q.cpu(), torch.float32),
    ):
        assert cast(quantized) is quantized
        assert quantized.weight is weight and weight.dtype == weight.grad.dtype == quantized.bias.dtype == dtype
        assert weight.untyped_storage().nbytes() == dtype.itemsize
        assert weight.codes is quantized.codes and torch.equal(quantized.codes, codes)
        assert weight.scale is quantized.scale and torch.equal(quantized.scale, scale)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert is_quantized(quantized.half().weight) and quantized.weight.codes is quantized.codes
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_meta_device():
    with torch.device("meta"):
        quantized = QuantLinear(300, 70)
    assert quantized.weight.is_meta and quantized.codes.is_meta and quantized(torch.empty(2, 300, device="meta")).is_meta
    quantized.to_empty(device="cpu")
    assert is_quantized(quantized.weight) and not quantized.weight.is_meta and quantized.weight.codes is quantized.codes
    quantized.reset_parameters()
    assert quantized.to("meta").weight.is_meta and is_quantized(quantized.weight) and quantized.scale.is_meta


def by_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), by_torch_save], ids=["deepcopy", "pickle", "torch.save"]
)
def test_copies(duplicate):
    quantized, _ = layers(dtype=torch.bfloat16)
    quantized.weight.requires_grad_(False)
    model = duplicate(nn.Sequential(quantized, nn.ReLU()))
    made = model[0]
    assert type(made.weight) is QuantWeight and made.weight.codes is made.codes and made.weight.scale is made.scale
    assert made.codes.data_ptr() != quantized.codes.data_ptr()
    assert not made.weight.requires_grad and made.weight.dtype == torch.bfloat16
    x = torch.randn(2, 300, dtype=torch.bfloat16)
    assert torch.equal(made(x), quantized(x))
    made.codes.zero_()
    assert quantized.codes.any()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    quantized, _ = layers()
    state = quantized.state_dict()
    assert list(state) == ["bias", "codes", "scale"]
    other = QuantLinear(300, 70)
    assert not any(other.load_state_dict(state, assign=assign))  # neither missing nor unexpected
    assert torch.equal(other.codes, quantized.codes) and torch.equal(other.scale, quantized.scale)
    assert other.weight.codes is other.codes and other.weight.scale is other.scale


def test_a_float_weight_is_quantized_as_it_is_loaded():
    torch.manual_seed(3)
    plain, quantized = nn.Linear(300, 70, dtype=torch.bfloat16), QuantLinear(300, 70)
    model = nn.Sequential(quantized)
    assert not any(model.load_state_dict(nn.Sequential(plain).state_dict()))
    codes, scale = torch.ops.lowrank.quantize_int8(plain.weight.detach())
    assert torch.equal(quantized.codes, codes) and torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.bias, plain.bias.float())


def test_what_does_not_load_is_named():
    quantized = nn.Sequential(QuantLinear(300, 70))
    state = quantized.state_dict()
    codes = quantized[0].codes.clone()
    for key, value, message in (
        ("0.codes", state["0.codes"].float(), r"0\.codes must be torch\.int8, got torch\.float32"),
        ("0.scale", state["0.scale"].half(), r"0\.scale must be torch\.float32, got torch\.float16"),
        ("0.codes", torch.zeros(70, 299, dtype=torch.int8), r"size mismatch for 0\.codes"),
        ("0.weight", torch.zeros(70, 299), r"size mismatch for 0\.codes"),
        ("0.weight", torch.zeros(70, 300, dtype=torch.float64), r"0\.weight.*float32, bfloat16 or float16, got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            quantized.load_state_dict({**state, key: value})
        assert torch.equal(quantized[0].codes, codes)
    with pytest.raises(RuntimeError, match='Missing key.*"0.codes"'):
        quantized.load_state_dict({"0.bias": state["0.bias"], "0.scale": state["0.scale"]})


def test_construction_draws_as_a_linear_layer():
    torch.manual_seed(5)
    plain = nn.Linear(300, 70)
    torch.manual_seed(5)
    quantized = QuantLinear(300, 70)
    codes, scale = torch.ops.lowrank.quantize_int8(plain.weight.detach())
    assert torch.equal(quantized.codes, codes) and torch.equal(quantized.bias, plain.bias)
    assert QuantLinear(300, 70, bias=False).bias is None


@pytest.mark.parametrize("group_size, got", [(0, "0"), (48, "48"), (-256, "-256"), (2048, "2048"), (256.0, "256.0")])
def test_group_sizes_that_are_none(group_size, got):
    for make in (
        lambda: QuantLinear(300, 70, group_size=group_size),
        lambda: QuantLinear.from_linear(nn.Linear(300, 70), group_size),
    ):
        with pytest.raises(ValueError, match=f"^group_size must be a power of two from 32 to 1024, got {got}$"):
            make()


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match="weight must be float32, bfloat16 or float16, got torch.float64"):
        QuantLinear(8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight must be float32, bfloat16 or float16, got torch.float64"):
        QuantLinear.from_linear(nn.Linear(8, 8).double())
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 4\), got \(4, 8\)"):
        QuantLinear(4, 8).quantize_(torch.zeros(4, 8))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(backend):
    torch._dynamo.reset()
    model = nn.Sequential(layers()[0], nn.GELU(), QuantLinear(70, 32))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(5, 300)

    def run(function):
        given = x.clone().requires_grad_()
        y = function(given)
        y.square().sum().backward()
        out = [y.detach(), given.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return out

    for got, want in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=100 * 2**-23 * want.abs().max().item())  # other sums, in fp32


def test_the_handle_is_traceable():
    torch._dynamo.reset()
    quantized, _ = layers()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def negate(param):
        if is_quantized(param):
            param.codes.neg_()
        return param.scale.sum() * param.group_size

    before = quantized.codes.clone()
    assert negate(quantized.weight) == quantized.scale.sum() * 256
    assert torch.equal(quantized.codes, -before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    first, second = layers()[0], QuantLinear(70, 40)
    model = nn.Sequential(first, nn.Tanh(), second)
    x = torch.randn(6, 300, requires_grad=True)
    grads = []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        function(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
        x.grad = None
        model.zero_grad()
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_fake_tensors():
    with FakeTensorMode():
        plain = nn.Linear(300, 70)
        quantized = QuantLinear.from_linear(plain)
        weight = quantized.weight
        assert is_quantized(weight) and isinstance(weight, nn.Parameter)
        assert weight.codes is quantized.codes and weight.scale is quantized.scale and weight.group_size == 256
        seen = []
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
        quantized(torch.randn(4, 300)).sum().backward()
        assert seen == [(70, 300)]
        assert not is_quantized(quantized.bias)


def test_reads_the_layers_newest_buffers():
    quantized, _ = layers()
    quantized._buffers["codes"] = torch.zeros_like(quantized.codes)  # as accelerate puts a tensor into a module
    assert quantized.weight.codes is quantized.codes


def test_differentiable_once():
    quantized, _ = layers()
    x = torch.randn(2, 300, requires_grad=True)
    (grad,) = torch.autograd.grad(quantized(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
