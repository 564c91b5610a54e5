"""The one step, in every combination of policies that it admits, against the oracle; and what it moves."""

import itertools

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.step import BASES, MOMENTS, RULES, WEIGHTS
from lowrank_sys.kernels.step import step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "residual_scale": 0.1}
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
GROUP = 32  # of INT4 bases; of INT8 weights it is 64


def admitted(weight, basis, moments, remainder, projected):
    return (basis != "key" or remainder == "scaled-gradient") and (not projected or remainder == "none")


COMBINATIONS = [row for row in itertools.product(WEIGHTS, BASES, MOMENTS, RULES, (False, True)) if admitted(*row)]
EVERY = pytest.mark.parametrize("policies", COMBINATIONS, ids=lambda row: "-".join((*row[:4], *(["projected"] if row[4] else []))))
# Beside the policies: APOLLO-Mini, without limiters; a sign; plain SGD.
VARIANTS = {
    "none": [{}],
    "scaled-gradient": [{"limited": True}, {"per_tensor": True, "scale_front": True, "limited": True}, {"limited": False}],
    "scaled-residual": [{"limited": True, "gram": True}, {"limited": True, "gram": False}, {"limited": False, "gram": False}],
    "state-free": [{"sign": True}, {"sign": False}],
}


class Matrix:
    """The tensors of one matrix on the device, and the oracle's of the same values: in fp64, unless the weight is in INT8."""

    def __init__(self, lane, policies, m, n, r, left, *, seed, dtypes=(FP32, FP32, FP32), limited=False, gram=False):
        self.weight, self.basis, self.moments, self.remainder, projected = policies
        self.left, draw = left, torch.Generator().manual_seed(seed)
        d, shape = (m, (r, n)) if left else (n, (m, r))
        param, grad, of_basis = dtypes
        randn = lambda *size: torch.randn(size, generator=draw)  # noqa: E731
        got, want = {}, {}
        weight = 0.1 * randn(m, n)
        if self.weight == "int8":
            got["weight"], got["weight_scale"] = reference.quantize_int8(weight, group_size=64)
        else:
            got["weight"] = weight.to(param)
        got["gradient"] = randn(*shape) if projected else randn(m, n).to(grad)
        # Of a basis that is not orthonormal, the residual of one channel can be far from that of the others.
        basis = randn(d, r) / d**0.5
        if self.remainder == "scaled-residual" and not gram and r <= d:
            basis = torch.linalg.qr(basis).Q.contiguous()
        if self.basis == "int4":
            got |= dict(zip(("basis", "basis_scale", "basis_offset"), reference.quantize_int4(basis, group_size=GROUP)))
            basis = reference.dequantize_int4(got["basis"], got["basis_scale"], got["basis_offset"], d=d, group_size=GROUP)
        elif self.basis == "key":
            got["basis"] = torch.tensor([-7, 3, 11 + seed, 5])
        else:
            got["basis"] = basis = basis.to(of_basis)
        if gram:
            got["gram"] = basis.float().T @ basis.float()
        first, second = 0.1 * randn(*shape), 0.1 * randn(*shape).abs() + 0.01
        if self.moments == "8bit":
            for name, moment, signed in (("exp_avg", first, True), ("exp_avg_sq", second, False)):
                got[name], got[f"{name}_absmax"] = reference.quantize_blockwise(moment, signed=signed)
        else:
            got |= {"exp_avg": first, "exp_avg_sq": second}
        if limited:
            got["limiter"] = torch.tensor(0.5)
        got["step"] = torch.tensor(2.0 + seed)
        self.values = basis.double()
        wide = self.weight == "float"
        for name, tensor in got.items():
            want[name] = tensor.double() if wide and tensor.is_floating_point() and "absmax" not in name else tensor.clone()
        if wide and self.basis == "int4":  # the oracle's products are in fp64 on the values of the codes
            want = {name: tensor for name, tensor in want.items() if name not in BASES["int4"]} | {"basis": self.values.clone()}
        want["step"] = got["step"].clone()
        self.want = want
        self.got = {name: lane.put(tensor.to(lane.device)) for name, tensor in got.items()}
        self.before = {name: tensor.clone() for name, tensor in self.got.items()}

    def free(self, scale=1.0):
        """Where the sign of the residual is within rounding of zero."""
        g = self.before["gradient"].double().cpu() * scale
        b = self.values
        return (g - (b @ (b.T @ g) if self.left else (g @ b) @ b.T)).abs() < 1e-4


def columns(matrices, which):
    tensors = [getattr(matrix, which) for matrix in matrices]

    def of(*names):
        return [its[name] for name in names if name in tensors[0] for its in tensors]

    return (
        of("weight"),
        of("weight_scale"),
        of("gradient"),
        of("basis"),
        of("basis_scale", "basis_offset", "gram"),
        of("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "limiter"),
        of("step"),
    )


def run(matrices, policies, left, variant, device, **guards):
    """The step of the kernels, and that of the oracle; returns what both counted as left out."""
    weight, basis, moments, remainder, projected = policies
    options = {key: value for key, value in variant.items() if key not in ("limited", "gram")} | HYPER
    options |= dict(weight=weight, moments=moments, remainder=remainder, rule=RULES[remainder], projected=projected, left=left)
    options |= dict(scale=0.5, group_size=64, basis_group_size=GROUP, seed=2**40, lr=torch.tensor(0.05, dtype=torch.float64))
    if weight == "int8":
        options |= dict(parameters=list(range(len(matrices))), offsets=[8 * i + i % 2 for i in range(len(matrices))])
    counts = []
    for which, function, its_basis, place in (
        ("got", step, basis, device),
        ("want", reference.step, "dense" if basis == "int4" and weight == "float" else basis, torch.device("cpu")),
    ):
        its = {name: guard.to(place) for name, guard in guards.items()}
        counts.append(torch.zeros((), dtype=torch.int64, device=place))
        function(*columns(matrices, which), basis=its_basis, skipped=counts[-1], **its, **options)
    return [count.item() for count in counts]


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
        wide = alike.repeat_interleave(64, 1)[:, : want["weight"].shape[1]] & ~free
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
