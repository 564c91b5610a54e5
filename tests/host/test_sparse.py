"""Selecting and stepping rows on 1, 32 and 256 real threads: the bits of the ops."""

import pytest
import torch

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

THREADS = (1, 32, 256)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=0.25)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def name(dtype):
    return str(dtype).removeprefix("torch.")


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.numpy() if tensor.dtype in (torch.float32, torch.int32, torch.uint8) else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("method", ["top", "sample", "sample_replace"])
@pytest.mark.parametrize("d, r", [(1, 1), (255, 30), (700, 300)])
def test_selection_is_that_of_the_op(method, d, r):
    norms = torch.rand(d)
    norms[::5], norms[::7] = 0, torch.nan
    want, want_scale = torch.ops.lowrank.select_rows(norms, r=r, method=method, seed=11, step=5, parameter=6)
    for threads in THREADS:
        indices, scale = torch.empty(r, dtype=torch.int32), torch.empty(r)
        _host.select_rows(threads, method, array(norms), 11, 5, 6, array(indices), array(scale))
        assert torch.equal(indices, want), threads
        torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)  # expm1 of another build


@SIDES
@pytest.mark.parametrize("w_dtype, g_dtype", [(0, 0), (1, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("wide", [45, 96])
def test_grass_step_is_that_of_the_op(left, w_dtype, g_dtype, wide):
    w, g = torch.randn(33, wide).to(FLOATS[w_dtype]), torch.randn(33, wide).to(FLOATS[g_dtype])
    indices, shape = torch.randperm(33 if left else wide)[:9].int(), (9, wide) if left else (33, 9)
    g[indices[2] if left else 4, 5 if left else indices[3]] = torch.nan
    m, v, scale = torch.randn(shape), torch.rand(shape), torch.rand(9) + 0.5
    want, step, skipped = [w.clone(), m.clone(), v.clone()], torch.tensor(4.0), torch.tensor(0)
    torch.ops.lowrank.grass_step(
        [want[0]],
        [g],
        [indices],
        [scale],
        [want[1]],
        [want[2]],
        [step],
        lr=torch.tensor(0.01),
        **HYPER,
        left=left,
        grad_scale=torch.tensor(0.5),
        skipped=skipped,
    )
    adam = _host.AdamStep(**HYPER, lr=torch.tensor(0.01).item(), step=5.0)
    for threads in THREADS:
        for vector in (1, 8) if wide % 32 == 0 else (1,):
            got, ok = [w.clone(), m.clone(), v.clone()], torch.empty(wide, dtype=torch.uint8)
            left_out = _host.grass_step(
                threads,
                vector,
                left,
                array(got[0]),
                name(w.dtype),
                array(g),
                name(g.dtype),
                array(indices),
                array(scale),
                array(got[1]),
                array(got[2]),
                array(ok),
                0.5,
                adam,
            )
            assert left_out * (33 if left else wide) == skipped
            assert all(map(torch.equal, got, want)), (threads, vector)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_and_scatter_are_those_of_the_ops(dtype):
    g, x, index = torch.randn(3, 515).to(dtype), torch.randn(1, 515), torch.tensor([1], dtype=torch.int32)
    want = torch.ops.lowrank.gather_rows(g, index, torch.tensor([0.3]), left=True)
    moved = g.clone()
    torch.ops.lowrank.scatter_add_rows_(moved, x, index, None, alpha=-0.5, left=True)
    for threads in THREADS:
        for vector in (1, 4):
            row, got = g[1].clone(), torch.empty(515)
            _host.gather_row(threads, vector, array(row), name(dtype), array(got), 0.3)
            assert torch.equal(got, want[0])
            _host.add_row(threads, vector, array(row), name(dtype), array(x[0]), -0.5)
            assert torch.equal(row, moved[1])
