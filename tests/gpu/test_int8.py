"""INT8 weights on a GPU: the bits of the oracle, products within rounding, nothing waits, steps are captured in a graph."""

import pytest
import torch

from lowrank_sys import reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 4096, 256), (33, 1031, 64), (5, 7, 32), (20, 3000, 1024), (0, 5, 32)]
STREAM = {"seed": -5, "step": 7, "parameter": 11}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, want):
    return all(torch.equal(a.cpu().nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_oracle(shape, dtype):
    m, n, group_size = shape
    weight = randn(m, n)
    weight[: m // 4] = 0.0
    weight[-1:, -1:] = torch.nan
    weight = weight.to(dtype)
    want = reference.quantize_int8(weight, group_size=group_size)
    got = ops.quantize_int8(weight.cuda(), group_size=group_size)
    assert same(got, want)
    for out in (None, *FLOATS):
        assert same(
            [ops.dequantize_int8(*got, group_size=group_size, dtype=out)],
            [reference.dequantize_int8(*want, group_size=group_size, dtype=out)],
        )
    for step, (size, offset) in enumerate([(1e-2, 0), (1e-2, 3), (10.0, 8), (0.0, 0)]):
        update = randn(m, n, seed=step, dtype=dtype)
        update[:1, :1] = torch.inf
        call = {"decay": 0.9, "seed": 2**40, "step": step, "parameter": 2, "offset": offset, "group_size": group_size}
        reference.int8_update_(*want, update, alpha=-size, **call)
        numbers = {"alpha": -size, "decay": 0.9, "step": step}
        numbers = {name: torch.tensor(value, device="cuda") for name, value in numbers.items()}
        again = [x.clone() for x in got]
        ops.int8_update_(*got, update.cuda(), alpha=-size, **call)
        ops.int8_update_(*again, update.cuda(), **call | numbers)
        assert same(got, want) and same(again, want)


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


def test_opcheck():
    weight = [x.cuda() for x in reference.quantize_int8(randn(8, 300))]
    torch.library.opcheck(ops.quantize_int8.default, (randn(8, 300).cuda(),))
    torch.library.opcheck(ops.int8_update_.default, (*weight, randn(8, 300).cuda()), STREAM)
    torch.library.opcheck(ops.int8_linear.default, (randn(4, 300).cuda().requires_grad_(), *weight))
