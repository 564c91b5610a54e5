"""Blockwise 8-bit codes on a GPU: the bytes of the CPU, and steps against the oracle."""

import pytest
import torch

from lowrank_sys import reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def same(a, b):
    return torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8))


def hostile(n, dtype=torch.float32):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if n > 2000:
        x[256:512], x[600], x[1024:1280], x[-1] = 0, torch.nan, x[1024:1280] * 1e-3, torch.inf
    return x.to(dtype)


@SIGNS
def test_every_top_half(signed):
    tops = torch.arange(0x3F80, dtype=torch.int32) << 16
    y = (tops[:, None] | torch.tensor([0, 1, 0x7FFF, 0xFFFF], dtype=torch.int32)).view(-1).view(torch.float32)
    y = torch.cat([y, -y, *(reference.blockwise.midpoints(signed).nextafter(torch.tensor(t)) for t in (2.0, -2.0))])
    y = torch.nn.functional.pad(y, (0, -len(y) % 255)).view(-1, 255)
    y = torch.cat([torch.ones(len(y), 1), y], dim=1).contiguous()
    assert all(map(same, ops.quantize_blockwise(y.cuda(), signed=signed), ops.quantize_blockwise(y, signed=signed)))


def stored(shape, by_row=False):
    draw = torch.Generator().manual_seed(7)
    m, m_absmax = ops.quantize_blockwise(torch.randn(shape, generator=draw), signed=True, by_row=by_row)
    v, v_absmax = ops.quantize_blockwise(torch.rand(shape, generator=draw) + 0.1, signed=False, by_row=by_row)
    return [m, v, m_absmax, v_absmax]


def on_gpu(values):
    return [x.cuda() for x in values]


@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("g_dtype", FLOATS, ids=str)
def test_adam_8bit_is_that_of_the_cpu(w_dtype, g_dtype):
    """The same core, without fused multiply-adds: the same bytes, in several launches' worth of tensors."""
    shapes = [(2100,), (700, 300), (0,), (), *[(37,)] * 60]
    ws, gs = [torch.randn(s).to(w_dtype) for s in shapes], [hostile(torch.Size(s).numel(), g_dtype).view(s) for s in shapes]
    states, steps = [stored(s) for s in shapes], [torch.tensor(float(i)) for i in range(len(shapes))]
    lists = [ws, gs, *map(list, zip(*states)), steps]
    other = [on_gpu(values) for values in lists]
    for values, device in ((lists, "cpu"), (other, "cuda")):
        skipped = torch.tensor(0, device=device)
        ops.adam_8bit_(
            *values,
            lr=torch.tensor(0.1, device=device),
            **HYPER,
            grad_scale=torch.tensor(0.5, device=device),
            found_inf=torch.tensor(0.0, device=device),
            skipped=skipped,
        )
        assert skipped.item() == sum(int((~g.isfinite()).sum()) for g in gs)
    for a, b in zip(lists, other):
        assert all(map(same, a, b))


@SIDES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(128, 4096), (7, 515), (20, 600), (4096, 128), (700, 1)], ids=str)
def test_low_rank_adam_8bit_is_that_of_the_cpu(shape, dtype, left):
    r = torch.randn(shape)
    r.view(-1)[5], r.view(-1)[-2] = torch.nan, 2.0**66
    moments = stored(shape, by_row=True)
    other = on_gpu(moments)
    updates = [torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype, device="cuda")]
    for gradient, update, values in ((r, updates[0], moments), (r.cuda(), updates[1], other)):
        ops.adam_8bit_low_rank_(
            [gradient],
            [update],
            *[[x] for x in values],
            [torch.tensor(3.0, device=update.device)],
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            left=left,
        )
    assert all(map(same, moments, other)) and same(*updates)


@SIDES
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("form", ["plain", "tensor", "list"])
def test_galore_step_8bit(form, dtype, left):
    m, n, r = 1000, 520, 32
    draw = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(m, n, generator=draw).to(dtype) for _ in range(2))
    basis = (torch.randn(m if left else n, r, generator=draw) / 30).to(dtype)
    moments = stored((r, n) if left else (m, r), by_row=True)
    grad[5, 7] = torch.nan
    got = on_gpu([param, grad, basis, *moments])
    want = [param.double(), grad.double(), basis.double(), *moments]
    reference.named("galore_step_8bit")(*want, step=3, lr=2**-7, left=left, **HYPER, scale=0.25)
    extra = dict(**HYPER, scale=0.25, left=left)
    step, lr = torch.tensor(3.0, device="cuda"), torch.tensor(2**-7, device="cuda")
    if form == "plain":
        ops.galore_step_8bit(*got, step=3, lr=2**-7, **extra)
    elif form == "tensor":
        ops.galore_step_8bit(*got, step=step, lr=lr, **extra)
    else:
        skipped = torch.zeros((), dtype=torch.int64, device="cuda")
        ops.galore_step_8bit(*([x] for x in got), [step.sub_(1)], lr=lr, skipped=skipped, **extra)
        assert step.item() == 3 and skipped.item() == (m if left else n)
    for i in (3, 4):
        apart = (got[i].cpu().int() - want[i].int()).abs()
        # tf32x3 sums differ in the last bits of fp32; few values lie so near to a midpoint.
        assert apart.max() <= 1 and (apart != 0).sum() <= 0.005 * apart.numel()
    moved = (want[0] - param.double()).abs().max().item()
    torch.testing.assert_close(
        got[0].cpu().double(), want[0], rtol=torch.finfo(dtype).eps, atol=moved * (1e-4 if dtype == torch.float32 else 0.01)
    )


@SIDES
@pytest.mark.parametrize("projected", [False, True], ids=["from G", "from R"])
@pytest.mark.parametrize("int4", [False, True], ids=["dense", "int4"])
def test_low_rank_lists_are_those_of_the_cpu(int4, projected, left):
    m, n, r = 1000, 520, 32
    draw = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(m, n, generator=draw) for _ in range(2))
    grad[5, 7] = torch.nan
    basis = [torch.randn(m if left else n, r, generator=draw) / 30]
    if int4:
        basis = list(ops.quantize_int4(*basis))
    moments = stored((r, n) if left else (m, r), by_row=True)
    if projected:
        grad = ops.project_int4(grad, *basis, left=left) if int4 else ops.project(grad, *basis, left=left)
    cpu = [param, grad, *basis, *moments, torch.tensor(2.0)]
    gpu = on_gpu(cpu)
    op = ops.subspace_step_8bit if projected else ops.galore_step_8bit
    for values, device in ((cpu, "cpu"), (gpu, "cuda")):
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        form = op.int4 if int4 else op.list
        form(*([x] for x in values), lr=torch.tensor(2**-7, device=device), skipped=skipped, **HYPER, scale=0.25, left=left)
        assert skipped.item() == (m if left else n) and values[-1].item() == 3
    for a, b in zip(gpu[-5:-3], cpu[-5:-3]):
        apart = (a.cpu().int() - b.int()).abs()
        assert apart.max() <= 1 and (apart != 0).sum() <= 0.005 * apart.numel()
    torch.testing.assert_close(gpu[0].cpu(), cpu[0], rtol=2**-20, atol=1e-5)


def test_no_synchronisation():
    w, moments = torch.randn(512, 768, device="cuda"), on_gpu(stored((512, 768)))
    basis, low = torch.randn(512, 32, device="cuda"), on_gpu(stored((32, 768), by_row=True))
    step, lr = torch.ones((), device="cuda"), torch.tensor(1e-2, device="cuda")

    def everything():
        codes, absmax = ops.quantize_blockwise(w, signed=True)
        ops.dequantize_blockwise(codes, absmax, signed=True)
        ops.adam_8bit_([w], [w], *[[x] for x in moments], [step], lr=lr, **HYPER)
        ops.galore_step_8bit(w, w, basis, *low, step=1, lr=1e-2, left=True, scale=0.25, **HYPER)
        ops.galore_step_8bit([w], [w], [basis], *[[x] for x in low], [step], lr=lr, left=True, scale=0.25, **HYPER)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
