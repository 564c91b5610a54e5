"""A Gaussian basis made in registers: the oracle's bits, and products with it against the oracle in fp64."""

import pytest
import torch

from lowrank_sys.kernels import common, configs, gaussian
from lowrank_sys.reference import gaussian as oracle

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WHICH = dict(seed=-5, step=3, parameter=7)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(130, 70, 0), (64, 3, 37), (1, 1, 5), (3, 2, 2**33)], ids=str)
def test_the_bits_are_the_oracles(lane, shape, dtype):
    d, rank, first = shape
    out = torch.empty(d, rank, dtype=dtype, device=lane.device)
    gaussian.gaussian_basis_(out, **WHICH, first=first)
    assert torch.equal(out.cpu(), oracle.gaussian_basis(d, rank, **WHICH, first=first).to(dtype))


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(63, 100, 7, 0), (150, 70, 20, 37), (70, 150, 66, 5), (1, 70, 1, 0), (100, 60, 130, 1)], ids=str)
def test_products(lane, shape, dtype, left):
    m, n, r, first = shape
    case = lane.case(m, n, r, left, dtype, dtype)
    kind = dict(**WHICH, left=left, first=first)
    got = gaussian.gaussian_project(case.grad, rank=r, **kind)
    depth = m if left else n
    lane.assert_close("R", got, oracle.gaussian_project(case.wants["grad"], rank=r, **kind), rtol=1e-6, atol=2e-6 * depth**0.5)
    want = case.wants["param"]
    gaussian.gaussian_back_project_(case.param, case.low_rank, alpha=-0.5, beta=0.75, **kind)
    oracle.gaussian_back_project_(want, case.wants["low_rank"], alpha=-0.5, beta=0.75, **kind)
    lane.assert_close("param", case.param, want, rtol=torch.finfo(dtype).eps, atol=4e-6)
    case.check_guards()


def test_empty(lane):
    for m, n, left in ((0, 5, True), (0, 5, False), (5, 0, True)):
        out = gaussian.gaussian_project(torch.empty(m, n, device=lane.device), rank=3, left=left, **WHICH)
        assert out.shape == ((3, n) if left else (m, 3)) and not out.any()


@SIDES
def test_split_does_not_matter(lane, monkeypatch, left):
    """However the projected axis is split, R is the same up to the order of fp32 sums; the same split gives the same bits."""
    results = []
    grad = torch.randn(*((400, 64) if left else (64, 400)), generator=torch.Generator().manual_seed(0)).to(lane.device)
    for multiprocessors in (1, 4, 4, 40):
        monkeypatch.setattr(configs, "target", lambda _, count=multiprocessors: configs.Target(80, count))
        results.append(gaussian.gaussian_project(grad, rank=5, left=left, first=9, **WHICH))
    assert torch.equal(results[1], results[2])
    for other in results[1:]:
        lane.assert_close("R", other, results[0], rtol=1e-6, atol=4e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bases_of_several_matrices_from_their_keys(lane, dtype):
    """One launch, a key each; a matrix whose step is switched off keeps what it has."""
    d, rank = 130, 20
    keys = [[-5, 3, 7, 0], [2**40, 0, 1, 37], [9, 9, 9, 2**33]]
    outs = [torch.zeros(d, rank, dtype=dtype, device=lane.device) for _ in keys]
    scalars = torch.zeros(3, common.SLOTS.value, device=lane.device)
    scalars[:2, common.ACTIVE.value] = 1.0
    gaussian.launch_gaussian_bases(outs, keys=[torch.tensor(key, device=lane.device) for key in keys], scalars=scalars)
    for out, (seed, step, parameter, first) in zip(outs[:2], keys):
        want = oracle.gaussian_basis(d, rank, seed=seed, step=step, parameter=parameter, first=first)
        assert torch.equal(out.cpu(), want.to(dtype))
    assert not outs[2].any()


@SIDES
def test_the_basis_is_made_once(lane, meter, left):
    """Whatever the number of tiles that read it, and G is read once."""
    case = lane.case(400, 350, 20, left)
    gaussian.gaussian_project(case.grad, rank=20, left=left, first=3, **WHICH)
    made, product = meter.launches
    assert set(made.counts) == {"out"} and (made.counts["out"]["stored"] == 1).all()
    assert (product.counts["basis"]["loaded"] > 1).all() and (product.counts["grad"]["loaded"] == 1).all()
    assert (product.counts["out"]["stored"] == 1).all()
