"""csrc/core on real threads: the same bits for every number of them, and those of the op."""

import pytest
import torch

from lowrank_sys.reference import philox

THREADS = (1, 32, 256)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")


def name(dtype):
    return str(dtype).removeprefix("torch.")


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_widening_is_torchs(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    got = torch.empty(2**16)
    _host.widen(array(every), name(dtype), got.numpy())
    want = every.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()].view(torch.int32), want[~want.isnan()].view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rounding_is_torchs(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middle = (every[1:].double() + every[:-1].double()).mul(0.5).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (2**20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat(
        [
            every,
            middle,
            middle.nextafter(torch.tensor(torch.inf)),
            middle.nextafter(torch.tensor(-torch.inf)),
            bits.view(torch.float32),
            torch.tensor([torch.inf, -torch.inf, 65519.9, 65520.0, 3.4e38]),
        ]
    )
    got = torch.empty(len(x), dtype=dtype)
    _host.narrow(x.numpy(), name(dtype), array(got))
    want = x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    keep = ~want.isnan()
    assert torch.equal(got[keep].view(torch.int16), want[keep].view(torch.int16))


def poisoned(shape, dtype, seed):
    """Normal values with a few that are skipped."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[3], x.view(-1)[-1] = torch.nan, torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("w_dtype", FLOATS)
@pytest.mark.parametrize("g_dtype", FLOATS)
def test_adamw_is_that_of_the_op(w_dtype, g_dtype):
    n = 70001
    w, g = torch.randn(n).to(w_dtype), poisoned(n, g_dtype, 1)
    m, v = torch.randn(n), torch.rand(n)
    step, skipped = torch.tensor(4.0), torch.tensor(0)
    want = [w.clone(), m.clone(), v.clone()]
    torch.ops.lowrank.adamw_step(
        [want[0]], [g], [want[1]], [want[2]], [step], lr=torch.tensor(0.01), **HYPER, grad_scale=torch.tensor(0.5), skipped=skipped
    )
    adam = _host.AdamStep(**HYPER, scale=1.0, lr=torch.tensor(0.01).item(), step=5.0)
    for threads in THREADS:
        for vector in (1, 8):
            got = [w.clone(), m.clone(), v.clone()]
            left_out = _host.adamw(
                threads, vector, array(got[0]), name(w_dtype), array(g), name(g_dtype), array(got[1]), array(got[2]), 0.5, adam
            )
            assert left_out == skipped == 2
            assert all(map(torch.equal, got, want)), (threads, vector)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(7, 515), (20, 3), (1, 1000), (5, 1)])
def test_low_rank_adam_is_that_of_the_op(left, shape):
    r = poisoned(shape, torch.float32, 2)
    m, v = torch.randn(shape), torch.rand(shape)
    rank, channels = shape if left else shape[::-1]
    basis, param = torch.zeros(rank, rank), torch.zeros(shape)
    step, skipped = torch.tensor(4.0), torch.tensor(0)
    want = [m.clone(), v.clone()]
    torch.ops.lowrank.subspace_step.list(
        [param],
        [r],
        [basis],
        [want[0]],
        [want[1]],
        [step],
        lr=torch.tensor(0.01),
        **HYPER,
        scale=0.25,
        left=left,
        grad_scale=torch.tensor(0.5),
        skipped=skipped,
    )
    adam = _host.AdamStep(**HYPER, scale=0.25, lr=torch.tensor(0.01).item(), step=5.0)
    for threads in THREADS:
        got, x, ok = [m.clone(), v.clone()], torch.empty(shape), torch.empty(channels, dtype=torch.uint8)
        _host.low_rank_adam(threads, left, array(r), array(got[0]), array(got[1]), array(x), ok.numpy(), 0.5, adam)
        assert all(map(torch.equal, got, want)), threads
        assert int((ok == 0).sum()) * rank == skipped
        assert x[(ok == 0).expand(shape) if left else (ok == 0)[:, None].expand(shape)].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(31, 104), (1, 1000), (30, 1), (10, 777), (43, 96), (3, 32)])
def test_norms_are_those_of_the_op(dtype, left, shape):
    g = torch.randn(shape).to(dtype)
    want = torch.ops.lowrank.channel_norms(g, left=left)
    wide = shape[1] % 8 == 0  # rows that start on 16 bytes: a GPU's warp then loads eight elements at a time
    for threads, vector in [(n, 1) for n in THREADS] + [(32, 8)] * wide:
        got = torch.empty_like(want)
        _host.channel_norms(threads, vector, left, array(g), name(dtype), got.numpy())
        assert torch.equal(got, want), (threads, vector)


def test_no_thread_count_of_torch_changes_the_bits():
    g = torch.randn(700, 900)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        w, m, v = g.clone(), g * 0.1, g.abs()
        torch.ops.lowrank.adamw_step([w], [g], [m], [v], [torch.zeros(())], lr=torch.tensor(0.1), **HYPER)
        results.append([w, m, v] + [torch.ops.lowrank.channel_norms(g, left=left) for left in (True, False)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1])
@pytest.mark.parametrize("group", [0, 2**32 - 1])
def test_random_bits_are_the_oracles(seed, group):
    bits = torch.empty(100, dtype=torch.uint16)
    _host.random16(seed=seed, step=9, parameter=4, group=group, out=bits.numpy())
    assert torch.equal(bits.long(), philox.random16(8 * group, 100, seed=seed, step=9, parameter=4))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", [0, 8, 5, 2**35 - 3])
def test_stochastic_rounding_is_that_of_the_op(dtype, first):
    values = poisoned(1003, torch.float32, 3) * torch.tensor([1.0, 2.0**-16, 2.0**-24, 6e4]).repeat(251)[:1003]
    values = values.contiguous()
    want = torch.empty(1003, dtype=dtype)
    stream = dict(seed=-5, parameter=7)
    torch.ops.lowrank.round_stochastic_(want, values, **stream, step=torch.tensor(3), offset=first)
    for threads in THREADS:
        for vector in (1, 4, 8):
            got = torch.empty(1003, dtype=dtype)
            _host.round(threads, vector, values.numpy(), name(dtype), 2**64 - 5, 3, 7, first, array(got))
            assert torch.equal(got.isnan(), want.isnan()), (threads, vector)
            assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0)), (threads, vector)
