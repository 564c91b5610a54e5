"""Steps on INT8 weights. They are compared with what steps on full weights take: the GEMMs, and apollo_step's own two passes."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.blockwise import STORED, _bytes_of_codes, _codes
from lowrank_sys.bench.cases.case import (
    ADAM,
    Op,
    adam_bytes,
    low_rank,
    moments,
    orthonormal,
    product,
    product_back,
    scalars,
    two_products,
)
from lowrank_sys.bench.cases.int4 import NAMES, int4_basis, int4_bytes
from lowrank_sys.bench.cases.int8 import GROUP, stored

STREAM = {"seed": 1, "parameter": 0}


def _weight(case, randn):
    param = randn(case.m, case.n)
    codes, scale = reference.quantize_int8(param, group_size=GROUP)
    return {"codes": codes, "weight_scale": scale, "param": param}


def _back_inputs(case, randn):
    return _weight(case, randn) | int4_basis(case, randn) | {"low_rank": randn(*low_rank(case), dtype=torch.float32)}


def _step_inputs(case, randn):
    return (
        _weight(case, randn)
        | {"grad": randn(case.m, case.n)}
        | int4_basis(case, randn)
        | _codes(low_rank(case), randn)
        | scalars(case)
    )


def _subspace_inputs(case, randn):
    return _back_inputs(case, randn) | _codes(low_rank(case), randn) | scalars(case)


def _apollo_inputs(case, randn):
    return (
        _weight(case, randn)
        | {"grad": randn(case.m, case.n), "basis": orthonormal(case, randn)}
        | moments(low_rank(case), randn)
        | scalars(case)
    )


def _result(t, truth):
    """Codes and scales; or the weight itself, which the truth gives in fp64, before rounding."""
    return [t["codes"], t["weight_scale"]] if truth is None else [truth]


def _values(outputs):
    """The weight, which neighbouring codes change by little."""
    return outputs if len(outputs) == 1 else [reference.dequantize_int8(*outputs, group_size=GROUP)]


def _dense(codes, scale):
    return reference.int8.ungrouped(reference.int8.grouped(codes.double(), GROUP) * scale[..., None], codes.shape[1])


def _basis(packed, scale, offset, d):
    return reference.dequantize_int4(packed, scale.float(), offset.float(), d=d, group_size=GROUP).double()


def _back_truth(codes, scale, x, *int4, alpha, decay, left, **_):
    return decay * _dense(codes, scale) + alpha * reference.galore.back(x, _basis(*int4, codes.shape[0 if left else 1]), left)


def _step_truth(codes, weight_scale, grad, packed, basis_scale, basis_offset, *stored, left, **rest):
    basis = _basis(packed, basis_scale, basis_offset, codes.shape[0 if left else 1])
    r = reference.project(grad, basis, left=left)
    return _subspace_truth(codes, weight_scale, r, packed, basis_scale, basis_offset, *stored, left=left, **rest)


def _subspace_truth(
    codes, weight_scale, r, packed, basis_scale, basis_offset, *stored, step, lr, beta1, beta2, eps, weight_decay, left, **rest
):
    basis = _basis(packed, basis_scale, basis_offset, codes.shape[0 if left else 1])
    moments = reference.blockwise.Moments(*stored, torch.float64)
    x = moments.adam(r, torch.ones_like(r, dtype=torch.bool), step=step, beta1=beta1, beta2=beta2, eps=eps)
    return (1 - lr * weight_decay) * _dense(codes, weight_scale) - lr * rest["scale"] * reference.galore.back(x, basis, left)


def _apollo_truth(codes, weight_scale, *tensors, lr, weight_decay, seed, parameter, **rest):
    weight = _dense(codes, weight_scale)
    reference.named("apollo_step")(weight, *tensors, lr=lr, weight_decay=weight_decay, **rest)
    return weight


def _back(f, t, case):
    # Small enough that the same update fits the same scales over many calls.
    return _result(
        t,
        f(
            t["codes"],
            t["weight_scale"],
            t["low_rank"],
            *(t[name] for name in NAMES),
            alpha=1e-3,
            decay=0.99,
            left=case.left,
            step=0,
            **STREAM,
        ),
    )


def _step_from(gradient):
    def step(f, t, case):
        return _result(
            t,
            f(
                t["codes"],
                t["weight_scale"],
                t[gradient],
                *(t[name] for name in (*NAMES, *STORED)),
                step=t["step"],
                lr=t["lr"],
                scale=0.25,
                left=case.left,
                **STREAM,
                **ADAM,
            ),
        )

    return step


def _apollo(f, t, case):
    return _result(
        t,
        f(
            t["codes"],
            t["weight_scale"],
            t["grad"],
            t["basis"],
            t["exp_avg"],
            t["exp_avg_sq"],
            step=t["step"],
            lr=t["lr"],
            scale=1.0,
            left=case.left,
            **STREAM,
            **ADAM,
        ),
    )


def taken_apart(t, case):
    """qgalore_step from its parts: weight and basis dequantised, the products, Adam in 8 bits, the weight quantised again."""
    ops, x = torch.ops.lowrank, torch.empty(low_rank(case), dtype=case.dtype, device=case.device)
    adam = {name: value for name, value in ADAM.items() if name != "weight_decay"}

    def run():
        weight = ops.dequantize_int8(t["codes"], t["weight_scale"], dtype=case.dtype)
        basis = ops.dequantize_int4(*(t[name] for name in NAMES), d=case.m if case.left else case.n, group_size=GROUP)
        basis = basis.to(case.dtype)
        r = (basis.T @ t["grad"] if case.left else t["grad"] @ basis).float()
        ops.adam_8bit_low_rank_([r], [x], *([t[name]] for name in STORED), [t["step"]], left=case.left, **adam)
        weight.addmm_(basis, x, alpha=-0.025) if case.left else weight.addmm_(x, basis.T, alpha=-0.025)
        codes, scale = ops.quantize_int8(weight)
        t["codes"].copy_(codes)
        t["weight_scale"].copy_(scale)

    return run


def weight_bytes(case):
    """Codes and scales, read and written."""
    return 2 * stored(case)


OPS = {
    "back_project_int8_": Op(
        _back_inputs,
        _back,
        traffic=lambda c: weight_bytes(c) + int4_bytes(c) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="back_project_int8_",
        oracle=reference.back_project_int8_,
        truth=_back_truth,
        read=_values,
    ),
    "qgalore_step": Op(
        _step_inputs,
        _step_from("grad"),
        traffic=lambda c: weight_bytes(c) + c.element * c.matrix + 2 * int4_bytes(c) + _bytes_of_codes(*low_rank(c)),
        flop=lambda c: 4 * c.matrix * c.rank,
        bases={"gemms": two_products, "parts": taken_apart},
        overload="qgalore_step.tensor",
        oracle=reference.named("qgalore_step"),
        truth=_step_truth,
        read=_values,
    ),
    "qgalore_subspace_step": Op(
        _subspace_inputs,
        _step_from("low_rank"),
        traffic=lambda c: weight_bytes(c) + int4_bytes(c) + 4 * c.low_rank + _bytes_of_codes(*low_rank(c)),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="qgalore_subspace_step.tensor",
        oracle=reference.named("qgalore_subspace_step"),
        truth=_subspace_truth,
        read=_values,
    ),
    "apollo_int8_step": Op(
        _apollo_inputs,
        _apollo,
        traffic=lambda c: weight_bytes(c) + c.element * (2 * c.matrix + c.basis) + adam_bytes(c.low_rank),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product},
        overload="apollo_int8_step.tensor",
        oracle=reference.named("apollo_int8_step"),
        truth=_apollo_truth,
        read=_values,
    ),
}
