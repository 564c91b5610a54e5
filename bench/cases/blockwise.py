"""Blockwise 8-bit codes, and steps whose moments are stored so."""

import torch

from lowrank_sys import reference
from lowrank_sys._ops.codebook import dynamic_map
from lowrank_sys.bench.cases.case import ADAM, Op, copy_of, low_rank, moments, orthonormal, product_back, scalars, two_products


def _codes(shape, randn, by_row=True):
    stored = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        coded = reference.quantize_blockwise(moments(shape, randn)[name], signed=signed, by_row=by_row)
        stored[name], stored[f"{name}_absmax"] = coded
    return stored


def _adam_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "grad": randn(case.m, case.n),
        **_codes((case.m, case.n), randn, by_row=False),
        **scalars(case),
    }


def _galore_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "grad": randn(case.m, case.n),
        "basis": orthonormal(case, randn),
        **_codes(low_rank(case), randn),
        **scalars(case),
    }


def _low_rank_inputs(case, randn):
    return {
        "low_rank": randn(*low_rank(case), dtype=torch.float32),
        "update": randn(*low_rank(case)),
        **_codes(low_rank(case), randn),
        **scalars(case),
    }


def _subspace_inputs(case, randn):
    return {"param": randn(case.m, case.n), "basis": orthonormal(case, randn), **_low_rank_inputs(case, randn)}


STORED = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


def _results(t):
    """What rounding moves by little: codes may be neighbours."""
    return [t["param"], t["exp_avg_absmax"], t["exp_avg_sq_absmax"]]


def _adam_truth(params, grads, *lists, lr, **hyper):
    """adam_8bit_ in fp64, which its rules refuse."""
    *stored, step = (tensor for (tensor,) in lists)
    reference.blockwise.adamw(
        params[0], grads[0], reference.blockwise.Moments(*stored, torch.float64), step=step + 1, lr=lr, **hyper
    )


def _fp64(lists, r, **adam):
    """Adam's update from R in fp64, and its moments' absmax."""
    *stored, step = (tensor for (tensor,) in lists)
    return reference.blockwise.Moments(*stored, torch.float64).adam(r, torch.ones_like(r, dtype=torch.bool), step=step, **adam)


def _low_rank_truth(low_rank_grads, updates, *lists, left, **adam):
    updates[0].copy_(_fp64(lists, low_rank_grads[0], **adam))


def _subspace_truth(params, low_rank_grads, bases, *lists, lr, weight_decay, scale, left, **adam):
    lists[-1][0] += 1
    update = _fp64(lists, low_rank_grads[0], **adam)
    params[0].mul_(1 - lr * weight_decay).sub_(lr * scale * reference.galore.back(update, bases[0], left))


def _adam_8bit(f, t, case):
    f([t["param"]], [t["grad"]], *([t[name]] for name in STORED), [t["step"]], lr=t["lr"], **ADAM)
    return _results(t)


def _galore_step_8bit(f, t, case):
    f(
        t["param"],
        t["grad"],
        t["basis"],
        *(t[name] for name in STORED),
        step=t["step"],
        lr=t["lr"],
        scale=0.25,
        left=case.left,
        **ADAM,
    )
    return _results(t)


def _adam_8bit_low_rank(f, t, case):
    adam = {name: value for name, value in ADAM.items() if name != "weight_decay"}
    f([t["low_rank"]], [t["update"]], *([t[name]] for name in STORED), [t["step"]], left=case.left, **adam)
    return [t["update"], t["exp_avg_absmax"], t["exp_avg_sq_absmax"]]


def _subspace_step_8bit(f, t, case):
    f(
        [t["param"]],
        [t["low_rank"]],
        [t["basis"]],
        *([t[name]] for name in STORED),
        [t["step"]],
        lr=t["lr"],
        scale=0.25,
        left=case.left,
        **ADAM,
    )
    return _results(t)


def bitsandbytes_adamw(t, case):
    """The step of bitsandbytes' AdamW8bit on the same tensors."""
    import bitsandbytes

    param = torch.nn.Parameter(t["param"].clone())
    param.grad = t["grad"]
    optimizer = bitsandbytes.optim.AdamW8bit(
        [param], lr=0.1, betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )
    return optimizer.step


def torchao_adamw(t, case):
    """The step of torchao's AdamW8bit on the same tensors."""
    from torchao.optim import AdamW8bit

    param = torch.nn.Parameter(t["param"].clone())
    param.grad = t["grad"]
    return AdamW8bit([param], lr=0.1, betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"]).step


def _bytes_of_codes(rows, columns):
    """Two moments of a byte, read and written, and their absmax; all of a tensor that is cut flat is one row."""
    return rows * (4 * columns + 16 * -(-columns // 256))


def _low_rank_bytes(case):
    return (4 + case.element) * case.low_rank + _bytes_of_codes(*low_rank(case))


def _bitsandbytes_codes(t, case):
    import bitsandbytes

    code = dynamic_map(True, case.device)
    return lambda: bitsandbytes.functional.quantize_blockwise(t["x"], code=code, blocksize=256)


OPS = {
    "adam_8bit_": Op(
        _adam_inputs,
        _adam_8bit,
        traffic=lambda c: c.element * 3 * c.matrix + _bytes_of_codes(1, c.matrix),
        flop=lambda c: 16 * c.matrix,
        bases={"bitsandbytes": bitsandbytes_adamw, "torchao": torchao_adamw},
        overload="adam_8bit_",
        oracle=reference.adam_8bit_,
        ranked=False,
        sided=False,
        truth=_adam_truth,
    ),
    "adam_8bit_low_rank_": Op(
        _low_rank_inputs,
        _adam_8bit_low_rank,
        traffic=_low_rank_bytes,
        flop=lambda c: 16 * c.low_rank,
        bases={"copy": copy_of(_low_rank_bytes)},
        overload="adam_8bit_low_rank_",
        oracle=reference.adam_8bit_low_rank_,
        truth=_low_rank_truth,
    ),
    "subspace_step_8bit": Op(
        _subspace_inputs,
        _subspace_step_8bit,
        traffic=lambda c: c.element * (2 * c.matrix + c.basis) + 4 * c.low_rank + _bytes_of_codes(*low_rank(c)),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="subspace_step_8bit.list",
        oracle=reference.named("subspace_step_8bit.list"),
        truth=_subspace_truth,
    ),
    "galore_step_8bit": Op(
        _galore_inputs,
        _galore_step_8bit,
        traffic=lambda c: c.element * (3 * c.matrix + 2 * c.basis) + _bytes_of_codes(*low_rank(c)),
        flop=lambda c: 4 * c.matrix * c.rank,
        bases={"gemms": two_products},
        overload="galore_step_8bit.tensor",
        oracle=reference.named("galore_step_8bit"),
    ),
    "quantize_blockwise": Op(
        lambda case, randn: {"x": randn(case.m, case.n)},
        lambda f, t, c: list(f(t["x"], signed=True)),
        traffic=lambda c: (c.element + 1) * c.matrix + 4 * -(-c.matrix // 256),
        flop=lambda c: 2 * c.matrix,
        bases={"bitsandbytes": _bitsandbytes_codes},
        overload="quantize_blockwise",
        oracle=reference.quantize_blockwise,
        ranked=False,
        sided=False,
        exact=True,
    ),
    "dequantize_blockwise": Op(
        lambda case, randn: dict(zip(("codes", "absmax"), reference.quantize_blockwise(randn(case.m, case.n), signed=True))),
        lambda f, t, c: [f(t["codes"], t["absmax"], signed=True)],
        traffic=lambda c: 5 * c.matrix + 4 * -(-c.matrix // 256),
        flop=lambda c: c.matrix,
        bases={"copy": lambda t, c: lambda: t["codes"].float()},
        overload="dequantize_blockwise",
        oracle=reference.dequantize_blockwise,
        ranked=False,
        sided=False,
        exact=True,
    ),
}
