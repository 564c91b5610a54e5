"""Every op on a GPU through `torch.ops.lowrank`, against the oracle in fp64, and what only a device can show.

Shapes and types in depth are in tests/interpret, which runs on the device too unless TRITON_INTERPRET is set.
"""

import pytest
import torch

from lowrank_sys import _ops, backends, reference

ops = torch.ops.lowrank
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
LOW_RANK = {**HYPER, "scale": 0.25}
FP32, BF16 = torch.float32, torch.bfloat16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


def tensors(m, n, r, left, dtype=FP32, seed=0):
    """param, grad, basis, exp_avg, exp_avg_sq and R on the GPU."""
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=FP32):
        return torch.randn(shape, generator=draw, device="cuda").to(dtype)

    d = m if left else n
    grad, basis = normal(m, n, dtype=dtype), (normal(d, r) / d**0.5).to(dtype)
    shape = _ops.low_rank_shape(grad, basis, left)
    return [normal(m, n, dtype=dtype), grad, basis, 0.1 * normal(*shape), 0.01 + 0.1 * normal(*shape).abs(), normal(*shape)]


def close(got, want, *, rtol, atol):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


def assert_stepped(got, want, before):
    param, exp_avg, exp_avg_sq = got
    close(exp_avg, want[1], rtol=1e-5, atol=1e-5)
    close(exp_avg_sq, want[2], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(param.dtype).eps
    moved = (want[0] - before.double()).abs().max().item()
    close(param, want[0], rtol=eps, atol=moved * (1e-5 if param.dtype == FP32 else 0.01))


@pytest.mark.parametrize("op", list(backends.TRITON))
def test_triton_serves(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank::{op}", "CUDA")


@SIDES
@TYPES
@pytest.mark.parametrize("shape", [(4096, 4096, 128), (4096, 1000, 32), (511, 1027, 200), (1, 333, 1)], ids=str)
@pytest.mark.parametrize("form", ["plain", "tensor", "list"])
@pytest.mark.parametrize("name", ["galore_step", "subspace_step"])
def test_step(name, form, shape, dtype, left):
    param, grad, basis, exp_avg, exp_avg_sq, low_rank = tensors(*shape, left, dtype)
    gradient = grad if name == "galore_step" else low_rank
    before = param.clone()
    want = [tensor.double() for tensor in (param, gradient, basis, exp_avg, exp_avg_sq)]
    reference.named(name)(*want, step=3, lr=2**-7, left=left, **LOW_RANK)
    arguments, op = (param, gradient, basis, exp_avg, exp_avg_sq), getattr(ops, name)
    step, lr = torch.tensor(3.0, device="cuda"), torch.tensor(2**-7, device="cuda")
    if form == "plain":
        op(*arguments, step=3, lr=2**-7, left=left, **LOW_RANK)
    elif form == "tensor":
        op(*arguments, step=step, lr=lr, left=left, **LOW_RANK)
    else:
        op(*([tensor] for tensor in arguments), [step.sub_(1)], lr=lr, left=left, **LOW_RANK)
        assert step.item() == 3
    assert_stepped((param, exp_avg, exp_avg_sq), (want[0], want[3], want[4]), before)


@SIDES
@TYPES
def test_products(dtype, left):
    param, grad, basis, _, _, low_rank = tensors(700, 1500, 96, left, dtype)
    want = reference.project(grad.double(), basis.double(), left=left)
    close(ops.project(grad, basis, left=left), want, rtol=1e-5, atol=1e-5)
    close(ops.channel_norms(grad, left=left), reference.channel_norms(grad.double(), left=left), rtol=1e-5, atol=1e-5)
    want = param.double()
    reference.back_project_(want, low_rank.double(), basis.double(), alpha=-0.5, beta=0.75, left=left)
    ops.back_project_(param, low_rank, basis, alpha=-0.5, beta=0.75, left=left)
    close(param, want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@TYPES
def test_adamw_step(dtype):
    param, grad, _, _, _, _ = tensors(300, 500, 4, True, dtype)
    exp_avg, exp_avg_sq = 0.1 * torch.randn_like(param, dtype=FP32), 0.1 * torch.rand_like(param, dtype=FP32)
    grad[7, 9] = float("nan")
    before, step, skipped = param.clone(), torch.tensor(2.0, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    want = [[tensor.double()] for tensor in (param, grad, exp_avg, exp_avg_sq)]
    lr = torch.tensor(2**-7, device="cuda")
    ops.adamw_step([param], [grad], [exp_avg], [exp_avg_sq], [step], lr=lr, skipped=skipped, **HYPER)
    ok = grad.isfinite()
    update = reference.adam.adam_(want[1][0], want[2][0], want[3][0], ok, step=3, beta1=0.9, beta2=0.999, eps=1e-8)
    want_param = torch.where(ok, (1 - 2**-7 * 0.1) * want[0][0] - 2**-7 * update, want[0][0])
    assert_stepped((param, exp_avg, exp_avg_sq), (want_param, want[2][0], want[3][0]), before)
    assert skipped.item() == 1 and step.item() == 3 and param[7, 9] == before[7, 9]


def step_lists(cases, steps, lr, left, **guards):
    params, grads, bases, exp_avgs, exp_avg_sqs, _ = map(list, zip(*cases))
    ops.galore_step(params, grads, bases, exp_avgs, exp_avg_sqs, steps, lr=lr, left=left, **LOW_RANK, **guards)


SHAPES = [(4096, 1024, 32), (1024, 4096, 64), (300, 200, 150), (300, 200, 150), (300, 200, 150)]


@SIDES
@TYPES
def test_captured_in_a_graph(dtype, left):
    """A captured step replays with new gradients and a new rate, and matches the eager one to the bit."""
    eager = [tensors(*shape, left, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    graphed = [[tensor.clone() for tensor in case] for case in eager]
    steps = [[torch.zeros((), device="cuda") for _ in SHAPES] for _ in range(2)]
    lr, skipped = torch.tensor(1e-2, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    found_inf = torch.zeros(1, device="cuda")
    guards = {"grad_scale": torch.full((1,), 0.5, device="cuda"), "found_inf": found_inf, "skipped": skipped}

    def step(cases, counters):
        step_lists(cases, counters, lr, left, **guards)

    found_inf.fill_(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(graphed, steps[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed, steps[1])
    for turn in range(4):
        found_inf.fill_(turn == 2)
        lr.mul_(0.5)
        for case, other in zip(eager, graphed):
            case[1].normal_()
            other[1].copy_(case[1])
        graph.replay()
        step(eager, steps[0])
    for case, other in zip(eager, graphed):
        for i in (0, 3, 4):
            assert torch.equal(case[i], other[i])
    assert [step.item() for step in steps[0] + steps[1]] == [3.0] * 6 and skipped.item() == 0


@SIDES
@TYPES
def test_deterministic(dtype, left):
    """Split sums are added in a fixed order, whichever program comes last; two streams do not disturb each other."""
    results = []
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(10):
        case = tensors(4096, 1024, 32, left, dtype)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[turn % 2]):
            ops.galore_step(*case[:5], step=1, lr=1e-2, left=left, **LOW_RANK)
        results.append(case)
    torch.cuda.synchronize()
    for case in results[1:]:
        for i in (0, 3, 4):
            assert torch.equal(case[i], results[0][i])


@SIDES
def test_no_synchronisation(left):
    cases = [tensors(*shape, left) for shape in SHAPES]
    steps, skipped = [torch.zeros((), device="cuda") for _ in SHAPES], torch.zeros((), dtype=torch.int64, device="cuda")
    grad_scale, found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    step, lr, cpu_lr = torch.ones((), device="cuda"), torch.tensor(1e-2, device="cuda"), torch.tensor(1e-2)

    def everything():
        step_lists(cases, steps, lr, left, grad_scale=grad_scale, found_inf=found_inf, skipped=skipped)
        step_lists(cases, steps, cpu_lr, left)
        param, grad, basis, exp_avg, exp_avg_sq, low_rank = cases[0]
        ops.galore_step(param, grad, basis, exp_avg, exp_avg_sq, step=1, lr=1e-2, left=left, **LOW_RANK)
        ops.galore_step(param, grad, basis, exp_avg, exp_avg_sq, step=step, lr=lr, left=left, **LOW_RANK)
        ops.subspace_step(param, low_rank, basis, exp_avg, exp_avg_sq, step=step, lr=lr, left=left, **LOW_RANK)
        ops.project(grad, basis, left=left)
        ops.back_project_(param, low_rank, basis, left=left)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@SIDES
def test_nonfinite_gradient(left):
    """A NaN stays in its channel: weights and moments there keep their bytes, and its weights are counted."""
    case = tensors(512, 768, 64, left)
    case[1][5, 7] = float("nan")
    before = [tensor.clone() for tensor in case]
    skipped = torch.zeros((), dtype=torch.int64, device="cuda")
    step_lists([case], [torch.zeros((), device="cuda")], torch.tensor(1e-2, device="cuda"), left, skipped=skipped)
    channel = (slice(None), 7) if left else (5, slice(None))
    for i in (0, 3, 4):
        assert case[i].isfinite().all() and torch.equal(case[i][channel], before[i][channel])
        assert (case[i] != before[i]).sum() > 0.9 * case[i].numel()
    assert skipped.item() == (512 if left else 768)


@SIDES
@TYPES
def test_nothing_of_full_size_is_allocated(dtype, left):
    case = tensors(4096, 4096, 128, left, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.galore_step(*case[:5], step=1, lr=1e-2, left=left, **LOW_RANK)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 0.25 * case[0].numel() * case[0].element_size()
