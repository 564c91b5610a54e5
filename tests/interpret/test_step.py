"""The one step, in every combination of policies that it admits, against the oracle."""

import pytest
import torch
from combinations import COMBINATIONS, VARIANTS, Matrix, run, title
from lanes import usual

from lowrank_sys._ops.step import MOMENTS, RULES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
EVERY = pytest.mark.parametrize("policies", COMBINATIONS, ids=title)


def check(lane, matrix, variant, *, grad_scale=1.0):
    """Moments, limiter and weights are the oracle's: codes neighbours, and few of them, as R differs in its last bits."""
    got, want, before = matrix.got, matrix.want, matrix.before
    depth = matrix.values.shape[0]
    for name in ("exp_avg", "exp_avg_sq"):
        if matrix.moments == "8bit":
            codes = got[name].cpu().int() - want[name].int()
            assert codes.abs().max() <= 1 and (codes != 0).sum() <= 0.002 * codes.numel() + 3, name
            lane.assert_close(f"{name}_absmax", got[f"{name}_absmax"], want[f"{name}_absmax"], rtol=1e-5, atol=1e-6)
        else:
            lane.assert_close(name, got[name], want[name], rtol=4e-6, atol=2e-6 * depth**0.5)
    if "limiter" in got:
        lane.assert_close("limiter", got["limiter"], want["limiter"], rtol=1e-5, atol=0)
    free = torch.zeros(want["weight"].shape, dtype=torch.bool)
    if variant.get("sign"):
        free = matrix.free(grad_scale)
        assert free.double().mean() < 0.01
    if matrix.weight == "int8":
        scale, old = got["weight_scale"].cpu(), want["weight_scale"]
        alike = (scale - old).abs() <= 1e-4 * old.abs()
        assert alike.double().mean() > 0.97
        wide = alike.repeat_interleave(matrix.group_size, 1)[:, : want["weight"].shape[1]] & ~free
        apart = (got["weight"].cpu().int() - want["weight"].int()).abs()[wide]
        assert apart.max() <= 1 and (apart > 0).sum() <= 2 + apart.numel() // 200
        return
    moved = (want["weight"] - before["weight"].double().cpu()).abs().nan_to_num().max().item()
    basis = before["basis"].dtype
    relative = torch.finfo(basis).eps if basis in (BF16, FP16) else 1e-5 * matrix.values.shape[1] ** 0.5
    weight = torch.where(free, want["weight"], got["weight"].double().cpu())
    dtype = got["weight"].dtype
    lane.assert_close("weight", weight, want["weight"], rtol=torch.finfo(dtype).eps, atol=max(relative * moved, 1e-6))


@SIDES
@EVERY
def test_every_combination(lane, policies, left):
    """Two matrices of one shape and one of another; channels with a NaN and an infinity; the gradient scaled."""
    shapes = [(63, 100, 7), (40, 75, 20), (63, 100, 7)]
    for variant in VARIANTS[policies[3]]:
        extra = {key: variant[key] for key in ("limited", "gram") if key in variant}
        matrices = [Matrix(lane, policies, *shape, left, seed=i, **extra) for i, shape in enumerate(shapes)]
        for which in ("got", "want"):
            g = getattr(matrices[0], which)["gradient"]
            g = g if left else g.T
            g[3, 5], g[4, 30] = torch.nan, torch.inf
        guards = {"grad_scale": torch.tensor([0.5]), "found_inf": torch.zeros(())}
        counts = run(matrices, policies, left, variant, lane.device, **guards)
        assert counts[0] == counts[1] == 2 * (63 if left else 100), variant
        for i, matrix in enumerate(matrices):
            assert matrix.got["step"].item() == 3.0 + i
            check(lane, matrix, variant, grad_scale=0.5)
            # Weights of the channels that were left out keep their bytes, or their values where a group got a new scale.
            if i == 0 and (policies[0] == "float" or not left):
                channels = (slice(None), [5, 30]) if left else ([5, 30],)
                assert torch.equal(matrix.got["weight"][channels], matrix.before["weight"][channels])
        lane.check_guards()


@SIDES
@EVERY
def test_found_inf(lane, policies, left):
    variant = VARIANTS[policies[3]][0]
    extra = {key: variant[key] for key in ("limited", "gram") if key in variant}
    matrix = Matrix(lane, policies, 40, 33, 5, left, seed=1, **extra)
    for which in ("got", "want"):
        getattr(matrix, which)["gradient"].fill_(torch.nan)
    assert run([matrix], policies, left, variant, lane.device, found_inf=torch.ones(1)) == [0, 0]
    for name, tensor in matrix.before.items():
        assert name == "gradient" or torch.equal(matrix.got[name], tensor), name
    lane.check_guards()


@SIDES
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP16, FP32, BF16), (FP32, BF16, FP32)], ids=str)
@pytest.mark.parametrize("remainder", RULES)
@pytest.mark.parametrize("moments", MOMENTS)
def test_types(lane, dtypes, remainder, moments, left):
    policies = ("float", "dense", moments, remainder, False)
    variant = VARIANTS[remainder][0]
    extra = {key: variant[key] for key in ("limited", "gram") if key in variant}
    matrix = Matrix(lane, policies, 64, 80, 16, left, seed=1, dtypes=dtypes, **extra)
    run([matrix], policies, left, variant, lane.device)
    check(lane, matrix, variant)
    lane.check_guards()


@pytest.mark.parametrize("left", usual([True], False), ids=["left", "right"])
@pytest.mark.parametrize("basis", ["dense", "int4"])
@pytest.mark.parametrize("remainder", RULES)
def test_the_widest_groups_of_an_int8_weight(lane, remainder, basis, left):
    policies = ("int8", basis, "fp32", remainder, False)
    for variant in VARIANTS[remainder]:
        extra = {key: variant[key] for key in ("limited", "gram") if key in variant}
        matrix = Matrix(lane, policies, 20, 1100, 17, left, seed=1, group_size=1024, **extra)
        run([matrix], policies, left, variant, lane.device)
        check(lane, matrix, variant)
        lane.check_guards()


@SIDES
@EVERY
@pytest.mark.parametrize("shape", [(0, 12, 3), (12, 0, 3)], ids=str)
def test_empty_shard(lane, policies, shape, left):
    """No rows or no columns: the moments that exist still decay, and nothing is read."""
    variant = VARIANTS[policies[3]][-1]
    matrix = Matrix(lane, policies, *shape, left, seed=1)
    assert run([matrix], policies, left, variant, lane.device) == [0, 0]
    for name in ("exp_avg", "exp_avg_sq"):
        lane.assert_close(name, matrix.got[name], matrix.want[name], rtol=1e-6, atol=1e-7)
    assert matrix.got["step"] == 4
