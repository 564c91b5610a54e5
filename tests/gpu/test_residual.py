"""APOLLO, Fira, FRUGAL and the Gaussian products on a GPU through `torch.ops.lowrank`, against the oracle in fp64."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys.optim import APOLLOAdamW, FiraAdamW, FrugalAdamW, GrassAdamW

ops = torch.ops.lowrank
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16 = torch.float32, torch.bfloat16
WHICH = {"seed": -5, "step": 3, "parameter": 7}
LR = 2**-7
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(4096, 1024, 128), (511, 1027, 33), (1, 333, 1)], ids=str)
STEPS = {
    "apollo": ("apollo_step", {"scale": 2.0}),
    "apollo-gaussian": ("apollo_step", {"scale": 2.0}),
    "apollo-tensor": ("apollo_step", {"scale": 4.0, "per_tensor": True}),
    "fira": ("fira_step", {"alpha": 0.25}),
    "frugal": ("frugal_step", {"scale": 0.5, "residual_scale": 0.1, "sign": False}),
}


def normal(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def close(got, want, *, rtol, atol):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


class Step:
    """Arguments of a step, and the oracle's copies in fp64."""

    def __init__(self, method, m, n, r, left, dtype=FP32, seed=0):
        self.name, extra = STEPS[method]
        d = m if left else n
        r = min(r, d)
        basis = torch.linalg.qr(normal(d, r, seed=seed + 1))[0].contiguous().to(dtype)
        if method == "apollo-gaussian":
            basis = torch.tensor([-7, 3, 11, 5], device="cuda")
        low = (r, n) if left else (m, r)
        self.tensors = [
            normal(m, n, seed=seed, dtype=dtype),
            normal(m, n, seed=seed + 2, dtype=dtype),
            basis,
            0.1 * normal(*low, seed=seed + 3),
            0.01 + 0.1 * normal(*low, seed=seed + 4).abs(),
        ]
        self.limiter = [] if self.name == "frugal_step" else [torch.tensor(0.8, device="cuda")]
        self.hyper = {**HYPER, **extra, "left": left}

    def wanted(self, step):
        want = [t.double() if t.is_floating_point() else t for t in self.tensors]
        limiter = [t.double() for t in self.limiter]
        reference.named(self.name)(*want, *limiter, step=step, lr=LR, **self.hyper)
        return [want[0], want[3], want[4], *limiter]

    def lists(self):
        more = [[t] for t in self.limiter] + ([[]] if self.name == "fira_step" else [])
        return [*([t] for t in self.tensors), *more]

    def check(self, want, before):
        param, _, _, exp_avg, exp_avg_sq = self.tensors
        for got, wanted in zip((exp_avg, exp_avg_sq), want[1:3]):
            close(got, wanted, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(self.limiter, want[3:]):
            close(got, wanted, rtol=1e-4, atol=0)
        moved = (want[0] - before.double()).abs().max().item()
        close(param, want[0], rtol=torch.finfo(param.dtype).eps, atol=moved * (1e-4 if param.dtype == FP32 else 0.01))


# A matrix of one row leaves Fira a residual of nothing but rounding, whose norm has no digits.
CASES = [(method, shape) for method in STEPS for shape in SHAPES.args[1] if method != "fira" or min(shape[:2]) > 1]


@SIDES
@TYPES
@pytest.mark.parametrize("form", ["plain", "tensor", "list"])
@pytest.mark.parametrize("method, shape", CASES, ids=str)
def test_step(method, form, shape, dtype, left):
    case = Step(method, *shape, left, dtype)
    before, want, op = case.tensors[0].clone(), case.wanted(3), getattr(ops, case.name)
    if form == "plain":
        op(*case.tensors, *case.limiter, step=3, lr=LR, **case.hyper)
    elif form == "tensor":
        step, lr = torch.tensor(3.0, device="cuda"), torch.tensor(LR, device="cuda")
        op(*case.tensors, *case.limiter, step=step, lr=lr, **case.hyper)
    else:
        step, skipped = torch.tensor(2.0, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
        op.list(*case.lists(), [step], lr=torch.tensor(LR, device="cuda"), skipped=skipped, **case.hyper)
        assert step.item() == 3 and skipped.item() == 0
    case.check(want, before)


@SIDES
@TYPES
@SHAPES
def test_gaussian_products(shape, dtype, left):
    m, n, r = shape
    grad, param = normal(m, n, dtype=dtype), normal(m, n, seed=1, dtype=dtype)
    low_rank = normal(*((r, n) if left else (m, r)), seed=2)
    where = {**WHICH, "left": left, "first": 37}
    d = m if left else n
    out = torch.empty(d, r, dtype=dtype, device="cuda")
    ops.gaussian_basis_(out, first=37, **WHICH)
    on_host = torch.empty(d, r, dtype=dtype)
    ops.gaussian_basis_(on_host, first=37, **WHICH)
    assert torch.equal(out.cpu(), on_host)  # the same bits on every device
    close(
        ops.gaussian_project(grad, rank=r, **where),
        reference.gaussian_project(grad.double(), rank=r, **where),
        rtol=1e-5,
        atol=1e-5 * d**0.5,
    )
    want = param.double()
    reference.gaussian_back_project_(want, low_rank.double(), alpha=-0.5, beta=0.75, **where)
    ops.gaussian_back_project_(param, low_rank, alpha=-0.5, beta=0.75, **where)
    close(param, want, rtol=torch.finfo(dtype).eps, atol=1e-5 * r**0.5)


@pytest.mark.parametrize("method", STEPS)
def test_captured_in_a_graph(method):
    """A captured step replays with new gradients, the key's refresh and a new rate, and matches the eager one to the bit."""
    eager, graphed = Step(method, 300, 200, 40, True), Step(method, 300, 200, 40, True)
    steps = [torch.zeros((), device="cuda") for _ in range(2)]
    lr, found_inf = torch.tensor(1e-2, device="cuda"), torch.ones(1, device="cuda")

    def run(case, step):
        getattr(ops, case.name).list(*case.lists(), [step], lr=lr, found_inf=found_inf, **case.hyper)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(graphed, steps[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(graphed, steps[1])
    for turn in range(4):
        found_inf.fill_(turn == 2)
        lr.mul_(0.5)
        for case in (eager, graphed):
            case.tensors[1].copy_(normal(300, 200, seed=turn))
            if method == "apollo-gaussian":
                case.tensors[2][1] = turn // 2
        graph.replay()
        run(eager, steps[0])
    assert steps[0].item() == steps[1].item() == 3
    for a, b in zip((*eager.tensors, *eager.limiter), (*graphed.tensors, *graphed.limiter)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [APOLLOAdamW, FiraAdamW, GrassAdamW, FrugalAdamW])
def test_a_step_of_an_optimizer_does_not_wait(build):
    """Nothing is read back: not the key, not the rows, not the limiter. (A refresh of a basis factorizes, which may.)"""
    params = [torch.nn.Parameter(normal(256, 128, seed=i)) for i in range(3)]
    optimizer = build([{"params": params, "rank": 16, "update_proj_gap": 100}], lr=torch.tensor(1e-3, device="cuda"))
    for _ in range(4):  # past the first refreshes
        for p in params:
            p.grad = normal(256, 128, seed=9)
        optimizer.step()
    for p in params:
        optimizer.state[p]["countdown"].fill_(50)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(p.isfinite().all() for p in params) and optimizer.skipped() == 0
