"""The block algorithms of a Gaussian basis and of the residual steps, on real threads."""

import pytest
import torch

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

from lowrank_sys.reference.gaussian import gaussian_basis  # noqa: E402

THREADS = (1, 32, 256)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def array(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype != torch.float32 else tensor.numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(130, 70, 0), (5, 1, 61), (64, 128, 2**33)])
def test_the_basis_is_that_of_the_op_and_of_the_oracle(shape, dtype):
    d, rank, first = shape
    which = dict(seed=-5, step=3, parameter=7, first=first)
    want = torch.empty(d, rank, dtype=dtype)
    torch.ops.lowrank.gaussian_basis_(want, **which)
    assert torch.equal(want, gaussian_basis(d, rank, **which).to(dtype))
    for threads in THREADS:
        got = torch.empty(d, rank, dtype=dtype)
        _host.gaussian_basis(threads, **which, out=array(got), dtype=name(dtype))
        assert torch.equal(got, want), threads


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(7, 515), (20, 3), (1, 1000), (5, 1)])
def test_norm_ratios_are_those_of_the_op(left, shape):
    """Moments of apollo_step with B = I, and its limiter, from the block algorithm's sums."""
    draw = torch.Generator().manual_seed(2)
    r = torch.randn(shape, generator=draw)
    r.view(-1)[-1] = torch.nan
    m, v = torch.randn(shape, generator=draw), torch.rand(shape, generator=draw)
    rank, channels = shape if left else shape[::-1]
    step, skipped, hyper = torch.tensor(4.0), torch.tensor(0), dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    want = [m.clone(), v.clone()]
    torch.ops.lowrank.apollo_step.list(
        [torch.zeros(shape)],
        [r],
        [torch.eye(rank)],
        [want[0]],
        [want[1]],
        [],
        [step],
        lr=torch.tensor(0.01),
        **hyper,
        scale=1.0,
        left=left,
        grad_scale=torch.tensor(0.5),
        skipped=skipped,
    )
    # NaN in one entry of G reaches its whole channel of R.
    if left:
        r[:, -1] = torch.nan
    else:
        r[-1] = torch.nan
    adam = _host.AdamStep(**hyper, scale=1.0, lr=torch.tensor(0.01).item(), step=5.0)
    for threads in THREADS:
        got, x, low = [m.clone(), v.clone()], torch.empty(shape), r.clone()
        sums, ok = [torch.empty(channels) for _ in range(2)], torch.empty(channels, dtype=torch.uint8)
        left_out = _host.ratio(
            threads,
            left,
            low.numpy(),
            got[0].numpy(),
            got[1].numpy(),
            x.numpy(),
            sums[0].numpy(),
            sums[1].numpy(),
            torch.ones(channels).numpy(),
            ok.numpy(),
            0.5,
            adam,
        )
        assert left_out * rank == skipped == rank
        assert all(map(torch.equal, got, want)), threads
        good = ok.bool()
        pick = (lambda t: t[:, good]) if left else (lambda t: t[good])
        dim = 0 if left else 1
        torch.testing.assert_close(sums[0][good], (0.5 * pick(r)).square().sum(dim))
        torch.testing.assert_close(sums[1][good], pick(x).square().sum(dim))
        torch.testing.assert_close(pick(x), pick(got[0]) / (pick(got[1]).sqrt() + 1e-8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("sign", [True, False])
def test_a_move_has_the_same_bits_on_any_threads(dtype, columns, sign):
    draw = torch.Generator().manual_seed(3)
    w, g = (torch.randn(9, 300, generator=draw).to(dtype) for _ in range(2))
    back, inside = (torch.randn(9, 300, generator=draw) for _ in range(2))
    c = torch.randn(300 if columns else 9, generator=draw)
    c[3] = torch.nan
    wide = c[None, :] if columns else c[:, None]
    direction = (g.float() - inside).sign() if sign else g.float()
    want = torch.where(wide.isnan(), w, (0.9 * w.float() - 0.1 * (back + wide * direction)).to(dtype))
    results = []
    for threads in THREADS:
        results.append(w.clone())
        _host.move(
            threads,
            columns,
            sign,
            array(results[-1]),
            name(dtype),
            array(g),
            name(dtype),
            back.numpy(),
            inside.numpy(),
            c.numpy(),
            0.9,
            -0.1,
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0][wide.isnan().expand_as(w)], w[wide.isnan().expand_as(w)])
    torch.testing.assert_close(results[0], want, atol=1e-6, rtol=torch.finfo(dtype).eps)
