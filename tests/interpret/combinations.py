"""Every combination of policies of the one step, and matrices to run it on: by the kernels, and by the oracle."""

import functools
import itertools

import torch

from lowrank_sys import reference
from lowrank_sys._ops.step import BASES, MOMENTS, RULES, WEIGHTS
from lowrank_sys.kernels.step import step

FP32 = torch.float32
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "residual_scale": 0.1}
GROUP = 32  # of INT4 bases; of INT8 weights it is 64


def admitted(weight, basis, moments, remainder, projected):
    return (basis != "key" or remainder == "scaled-gradient") and (not projected or remainder == "none")


COMBINATIONS = [row for row in itertools.product(WEIGHTS, BASES, MOMENTS, RULES, (False, True)) if admitted(*row)]


def title(policies):
    return "-".join((*policies[:4], *(["projected"] if policies[4] else [])))


# Beside the policies: APOLLO-Mini, without limiters; a sign; plain SGD.
VARIANTS = {
    "none": [{}],
    "scaled-gradient": [{"limited": True}, {"per_tensor": True, "scale_front": True, "limited": True}, {"limited": False}],
    "scaled-residual": [{"limited": True, "gram": True}, {"limited": True, "gram": False}, {"limited": False, "gram": False}],
    "state-free": [{"sign": True}, {"sign": False}],
}


class Matrix:
    """The tensors of one matrix on the device, and the oracle's of the same values: in fp64, unless the weight is in INT8."""

    def __init__(self, lane, policies, m, n, r, left, *, seed, dtypes=(FP32, FP32, FP32), limited=False, gram=False, group_size=64):
        self.weight, self.basis, self.moments, self.remainder, projected = policies
        self.left, self.group_size, draw = left, group_size, torch.Generator().manual_seed(seed)
        d, shape = (m, (r, n)) if left else (n, (m, r))
        param, grad, of_basis = dtypes
        randn = lambda *size: torch.randn(size, generator=draw)  # noqa: E731
        got, want = {}, {}
        weight = 0.1 * randn(m, n)
        if self.weight == "int8":
            got["weight"], got["weight_scale"] = reference.quantize_int8(weight, group_size=group_size)
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
                got[name], got[f"{name}_absmax"] = reference.quantize_blockwise(moment, signed=signed, by_row=True)
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
    options |= dict(
        scale=0.5, group_size=matrices[0].group_size, basis_group_size=GROUP, seed=2**40, lr=torch.tensor(0.05, dtype=torch.float64)
    )
    if weight == "int8":
        options |= dict(parameters=list(range(len(matrices))), offsets=[8 * i + i % 2 for i in range(len(matrices))])
    counts = []
    for which, function, its_basis, place in (
        ("got", step, basis, device),
        (
            "want",
            functools.partial(reference.step, checked=False),
            "dense" if basis == "int4" and weight == "float" else basis,
            torch.device("cpu"),
        ),
    ):
        its = {name: guard.to(place) for name, guard in guards.items()}
        counts.append(torch.zeros((), dtype=torch.int64, device=place))
        function(*columns(matrices, which), basis=its_basis, skipped=counts[-1], **its, **options)
    return [count.item() for count in counts]
