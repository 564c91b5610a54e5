"""INT8 weights on a GPU: the bits of the oracle, products within rounding, nothing waits, steps are captured in a graph."""

import pytest
import torch

from lowrank_sys import reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STREAM = {"seed": -5, "step": 7, "parameter": 11}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024, 256), (100, 333, 32)], ids=str)
def test_linear(shape, dtype):
    m, n, group_size = shape
    weight = [x.cuda() for x in reference.quantize_int8(randn(m, n), group_size=group_size)]
    w = reference.dequantize_int8(*weight, group_size=group_size).double()
    x, bias = randn(3, 50, n, seed=1, dtype=dtype).cuda().requires_grad_(), randn(m, seed=2).cuda().requires_grad_()
    y = ops.int8_linear(x, *weight, bias, group_size=group_size)
    dy = randn(3, 50, m, seed=3, dtype=dtype).cuda()
    y.backward(dy)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-20
    for got, a, b, add in ((y, x.detach(), w.T, bias.detach()), (x.grad, dy, w, 0)):
        want = a.double() @ b + add
        assert ((got.double() - want).abs() <= eps * (a.double().abs() @ b.abs() + want.abs() + 1)).all()
    torch.testing.assert_close(bias.grad, dy.float().sum((0, 1)), rtol=1e-4, atol=1e-3)


def test_a_zero_update_touches_no_byte():
    codes = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8, device="cuda")
    scale = torch.rand(4096, 16, device="cuda")
    before = codes.clone(), scale.clone()
    ops.int8_update_(codes, scale, torch.zeros(4096, 4096, device="cuda"), **STREAM)
    assert torch.equal(codes, before[0]) and torch.equal(scale, before[1])


def test_captured_in_a_graph_without_synchronisation():
    weight = [x.cuda() for x in reference.quantize_int8(randn(256, 512))]
    eager = [x.clone() for x in weight]
    update, step = 0.01 * randn(256, 512, seed=1).cuda(), torch.zeros((), device="cuda")
    numbers = {"alpha": torch.tensor(-1.0, device="cuda"), "decay": torch.tensor(0.99, device="cuda")}

    def run(tensors):
        ops.int8_update_(*tensors, update, **numbers, seed=1, step=step, parameter=2)

    run([x.clone() for x in weight])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step += 1
            graph.replay()
            run(eager)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, weight, eager))
