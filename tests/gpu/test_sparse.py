"""Structured sparse and subspace ops on a GPU: the CPU's selections to the bit, its step within rounding."""

import pytest
import torch

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import reference
from lowrank_sys.reference import selection
from lowrank_sys.subspace import transport

ops = torch.ops.lowrank
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.25}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
METHODS = ("top", "sample", "sample_replace")
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def inputs(m, n, r, left, dtype, seed=0):
    draw = torch.Generator("cuda").manual_seed(seed)
    d, shape = m if left else n, (r, n) if left else (m, r)

    def normal(*size):
        return torch.randn(size, generator=draw, device="cuda")

    indices = torch.randperm(d, generator=draw, device="cuda")[:r].int()
    return [
        normal(m, n).to(dtype),
        normal(m, n).to(dtype),
        indices,
        normal(r).abs() + 0.5,
        normal(*shape),
        0.1 + normal(*shape).abs(),
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d, r", [(1, 1), (100, 7), (4096, 128), (32000, 1024)])
def test_the_same_rows_as_on_the_cpu(method, d, r):
    norms = torch.rand(d, generator=torch.Generator().manual_seed(d))
    norms[::7], norms[3::100] = 0, torch.nan
    indices, scale = ops.select_rows(norms.cuda(), r=r, method=method, seed=5, step=6, parameter=7)
    want, want_scale = selection.select_rows(norms, r=r, method=method, seed=5, step=6, parameter=7)
    assert torch.equal(indices.cpu(), want)
    torch.testing.assert_close(scale.cpu(), want_scale, rtol=1e-6, atol=0)


@SIDES
@TYPES
@pytest.mark.parametrize("shape", [(4096, 1000, 32), (1000, 4096, 128), (511, 1027, 200), (1, 333, 1)], ids=str)
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_step(shape, dtype, left, decay):
    m, n, r = shape
    args = inputs(m, n, min(r, m if left else n), left, dtype)
    channel = (args[2][0], 5) if left else (0, args[2][0])
    args[1][channel] = float("nan")
    want = [x.cpu().clone() for x in args]
    step, lr, skipped = torch.tensor(2.0), torch.tensor(2**-7), torch.tensor(0)
    hyper, move = {**HYPER, "weight_decay": decay, "left": left}, torch.Tensor.cuda
    counts = move(skipped)
    ops.grass_step(
        *[[x] for x in args], [move(step)], lr=move(lr), skipped=counts, grad_scale=torch.ones(1, device="cuda"), **hyper
    )
    ops.grass_step(*[[x] for x in want], [step], lr=lr, skipped=skipped, **hyper)
    assert counts.item() == skipped.item() == (m if left else n)
    for got, expected in zip((args[4], args[5], args[0]), (want[4], want[5], want[0])):
        torch.testing.assert_close(got.cpu(), expected, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)


@SIDES
def test_bad_indices_are_left_out(left):
    """Out of range, or equal to an earlier one: they gather zeros or a copy, and are not written."""
    args = inputs(64, 96, 5, left, torch.float32)
    args[2] = torch.tensor([3, -1, 3, 1000, 7], dtype=torch.int32, device="cuda")
    before = [x.clone() for x in args]
    low_rank = ops.gather_rows(args[1], args[2], None, left=left)
    rows = low_rank if left else low_rank.T
    assert not rows[1].any() and not rows[3].any() and torch.equal(rows[0], rows[2])
    ops.grass_step(*args, step=1, lr=0.1, **HYPER | {"weight_decay": 0.0}, left=left)
    moved = ((args[0] != before[0]).any(dim=1 if left else 0)).nonzero().flatten()
    assert moved.tolist() == [3, 7]
    for now, then in zip(args[4:], before[4:]):
        now, then = (now, then) if left else (now.T, then.T)
        assert torch.equal(now[[1, 2, 3]], then[[1, 2, 3]]) and not torch.equal(now[[0, 4]], then[[0, 4]])
    ops.scatter_add_rows_(args[0], before[4], args[2], None, left=left)


@SIDES
def test_captured_in_a_graph_without_a_wait(left):
    """Selection, step, rotation, DCT and orthogonalization replay; nothing of them waits for the host."""
    eager = inputs(512, 768, 32, left, torch.float32)
    graphed = [x.clone() for x in eager]
    steps, lr = [torch.zeros((), device="cuda") for _ in range(2)], torch.tensor(1e-2, device="cuda")
    bases = [torch.randn(512 if left else 768, 32, device="cuda") for _ in range(2)]

    def run(case, step):
        param, grad, _, _, m, v = case
        indices, scale = ops.select_rows(ops.row_norms(grad, left=left), r=32, method="sample", seed=3)
        ops.grass_step([param], [grad], [indices], [scale], [m], [v], [step], lr=lr, left=left, **HYPER)
        ops.rotate_moments_(m, v, *bases, left=left)
        chosen, _ = ops.dct_select(grad, rank=32, left=left)
        return ops.dct_columns(chosen, d=512 if left else 768), ops.newton_schulz(grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run([x.clone() for x in eager], torch.zeros((), device="cuda"))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(graphed, steps[1])
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = run(eager, steps[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, expected in zip((*captured, *graphed), (*want, *eager)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@SIDES
def test_subspace_ops(left):
    generator = torch.Generator("cuda").manual_seed(0)
    old, new = (torch.linalg.qr(torch.randn(300, 16, generator=generator, device="cuda"))[0].contiguous() for _ in range(2))
    m = torch.randn((16, 500) if left else (500, 16), generator=generator, device="cuda")
    v, want = m.abs(), [m.double(), m.abs().double()]
    ops.rotate_moments_(m, v, old, new, left=left)
    c = transport.rotation(old, new, torch.float64)
    want = [transport.rotated(moment, turned, left=left) for moment, turned in zip(want, (c, c * c))]
    torch.testing.assert_close(m.double(), want[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(v.double(), want[1], atol=1e-5, rtol=0)
    assert (v >= 0).all()
    grad = torch.randn(300, 300, generator=generator, device="cuda")
    indices, norms = ops.dct_select(grad, rank=300, left=left)
    torch.testing.assert_close(norms.cpu(), ops.dct_select(grad.cpu(), rank=300, left=left)[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.newton_schulz(grad).cpu(), ops.newton_schulz(grad.cpu()), rtol=0, atol=1e-4)
    narrow = grad.bfloat16()
    torch.testing.assert_close(ops.newton_schulz(narrow).cpu(), ops.newton_schulz(narrow.cpu()), rtol=0, atol=18 * 2.0**-9)


def test_oracle_serves_a_device():
    """The oracle leaves the same indices out."""
    args = inputs(64, 96, 3, True, torch.float32)
    args[2] = torch.tensor([3, 3, -1], dtype=torch.int32, device="cuda")
    want = [x.clone() for x in args]
    ops.grass_step(*args, step=1, lr=0.1, **HYPER, left=True)
    reference.named("grass_step")(*want, step=1, lr=0.1, **HYPER, left=True)
    for i in (0, 4, 5):
        torch.testing.assert_close(args[i], want[i], rtol=1e-6, atol=1e-6)
