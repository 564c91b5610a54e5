"""Steps on INT8 weights on a GPU: the bits of the oracle where products are exact, neighbouring codes behind a step's products."""

import pytest
import torch

from lowrank_sys import reference

ops = torch.ops.lowrank
FP32, BF16 = torch.float32, torch.bfloat16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
METHODS = ("qgalore_step", "apollo_int8_step")
# m, n, r and the groups of the weight and of the basis.
SHAPES = [(1, 1, 1, 32, 32), (70, 300, 9, 64, 32), (330, 512, 16, 256, 256), (50, 1031, 3, 1024, 64), (1024, 4096, 128, 256, 256)]


def randn(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, want):
    return all(torch.equal(a.cpu().nan_to_num(7), b.cpu().nan_to_num(7)) for a, b in zip(got, want, strict=True))


def cuda(tensors):
    return [t if t is None else t.cuda() for t in tensors]


@SIDES
@pytest.mark.parametrize("kind", ["int4", FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_oracle(shape, kind, left):
    m, n, r, group_size, basis_group_size = shape
    d, draw = m if left else n, torch.Generator().manual_seed(1)
    # Small whole numbers, and halves: products are exact in any order, in tf32 and bf16 too.
    x = torch.randint(-4, 5, (r, n) if left else (m, r), generator=draw).float()
    basis = torch.randint(-4, 5, (d, r), generator=draw).to(BF16 if kind == BF16 else FP32), None, None
    if kind == "int4":
        packed = torch.randint(0, 256, (r, (d + 1) // 2), generator=draw, dtype=torch.uint8)
        if d % 2:
            packed[:, -1] &= 15
        groups = -(-d // basis_group_size)
        basis = packed, torch.full((r, groups), 0.5), torch.randint(-4, 5, (r, groups), generator=draw).float()
    (x[:, n // 2] if left else x[m // 2]).fill_(torch.nan if m > 1 else 2.0)
    weight = randn(m, n)
    weight[: m // 4] = 0.0
    want = reference.quantize_int8(weight, group_size=group_size)
    got = cuda(t.clone() for t in want)
    for step, alpha, offset in ((0, 2.0**-14, 0), (1, -(2.0**-6), 3), (2, 3.0, 2**40)):
        call = dict(left=left, seed=-7, parameter=5, offset=offset, group_size=group_size, basis_group_size=basis_group_size)
        reference.back_project_int8_(*want, x, *basis, alpha=alpha, decay=0.9, step=step, **call)
        numbers = {"alpha": alpha, "decay": 0.9, "step": step}
        again = [t.clone() for t in got]
        ops.back_project_int8_(*got, x.cuda(), *cuda(basis), **numbers, **call)
        numbers = {name: torch.tensor(value, dtype=torch.float64, device="cuda") for name, value in numbers.items()}
        ops.back_project_int8_(*again, x.cuda(), *cuda(basis), **numbers, **call)
        assert same(got, want) and same(again, want)


def matrix(op, m, n, r, left, seed=0):
    """Arguments of a step by the schema's order."""
    shape, d = (r, n) if left else (m, r), m if left else n
    basis = torch.linalg.qr(randn(d, r, seed=seed + 1)).Q.contiguous()
    first, second = 0.1 * randn(*shape, seed=seed + 2), 0.1 * randn(*shape, seed=seed + 3).abs() + 0.01
    args = [*reference.quantize_int8(0.1 * randn(m, n, seed=seed)), randn(m, n, seed=seed + 4, dtype=BF16)]
    if op == "apollo_int8_step":
        return [*args, basis, first, second, torch.tensor(0.5)]
    (m_codes, m_absmax), (v_codes, v_absmax) = (
        reference.quantize_blockwise(x, signed=s, by_row=True) for x, s in ((first, True), (second, False))
    )
    return [*args, *reference.quantize_int4(basis), m_codes, v_codes, m_absmax, v_absmax]


@SIDES
@pytest.mark.parametrize("op", METHODS)
def test_lists_against_the_oracle(op, left):
    rows = [matrix(op, *shape, left, seed=10 * i) for i, shape in enumerate([(300, 512, 16), (70, 300, 5), (300, 512, 16)])]
    (rows[0][2][:, 5] if left else rows[0][2][5]).fill_(torch.nan)
    lists = {"want": [list(column) for column in zip(*rows)]}
    lists["got"] = [cuda(t.clone() for t in column) for column in lists["want"]]
    results = {}
    for which, function in (("want", reference.ORACLES[f"{op}.list"]), ("got", getattr(ops, op).list)):
        device = "cuda" if which == "got" else "cpu"
        steps, skipped = [torch.tensor(float(i), device=device) for i in (0, 4, 9)], torch.tensor(0, device=device)
        function(
            *lists[which],
            steps,
            lr=torch.tensor(0.1, device=device),
            seed=1,
            parameters=[1, 2, 16],
            offsets=[0, 3, 64],
            grad_scale=torch.tensor(0.5, device=device),
            found_inf=torch.tensor(0.0, device=device),
            skipped=skipped,
            scale=1.0,
            left=left,
            **HYPER,
        )
        results[which] = [*(step.item() for step in steps), skipped.item()]
    assert results["got"] == results["want"]
    for got, want, got_scale, want_scale in zip(lists["got"][0], lists["want"][0], lists["got"][1], lists["want"][1]):
        close = (got_scale.cpu() - want_scale).abs() <= 1e-4 * want_scale.abs()
        assert close.double().mean() > 0.97
        difference = (got.cpu().int() - want.int()).abs()[close.repeat_interleave(256, 1)[:, : want.shape[1]]]
        assert difference.max() <= 1 and (difference > 0).sum() <= 2 + difference.numel() // 200


@pytest.mark.parametrize("op", METHODS)
def test_captured_in_a_graph_without_synchronisation(op):
    graphed = cuda(matrix(op, 256, 512, 16, True))
    eager = [t.clone() for t in graphed]
    lr = torch.tensor(0.01, device="cuda")
    counts = [torch.zeros((), device="cuda") for _ in range(2)]

    def run(tensors, step):
        getattr(ops, op).list(*([t] for t in tensors), [step], lr=lr, seed=1, parameters=[2], scale=1.0, left=True, **HYPER)

    run([t.clone() for t in graphed], torch.zeros((), device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(graphed, counts[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            graph.replay()
            run(eager, counts[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(graphed, eager) and counts[0] == counts[1] == 3


@pytest.mark.parametrize("op", METHODS)
def test_no_memory_of_the_size_of_the_weight(op):
    args = cuda(matrix(op, 2048, 4096, 8, False))
    settings = dict(step=1, lr=0.01, seed=1, parameter=2, scale=1.0, left=False, **HYPER)
    getattr(ops, op)(*args, **settings)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    getattr(ops, op)(*args, **settings)
    assert torch.cuda.max_memory_allocated() - before < 2048 * 4096
