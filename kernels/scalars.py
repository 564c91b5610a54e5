"""The scalars of a step: a row a matrix, made on the device in one launch however many matrices there are."""

import math

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import ACTIVE, ALPHA, CORRECTION1, CORRECTION2, DECAY, GRAD_SCALE, SLOTS


@triton.jit(do_not_specialize=["count"])
def scalars_kernel(
    steps,
    lr,
    grad_scale,
    found_inf,
    rows,
    draws,
    count,
    log_beta1,
    log_beta2,
    weight_decay,
    scale,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows (count, SLOTS) fp32 from steps (count,), computed in fp64 and rounded once; draws (count,) int64, if given, number the
    random bits: the step, 0 where that is not finite or huge.

    If ADVANCE, the step is the one that comes after: none if found_inf != 0, which also switches the rows off.

    Bytes a matrix: the step once, its row and number once.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < count
    active = tl.full([], 1.0, tl.float64)
    if found_inf is not None:
        active = (tl.load(found_inf) == 0).to(tl.float64)
    b_step = tl.load(steps + o, mask=m, other=1).to(tl.float64)
    if ADVANCE:
        b_step += active
    rate = tl.load(lr).to(tl.float64)
    p_row = rows + o * SLOTS
    tl.store(p_row + CORRECTION1, (1.0 - tl.exp(b_step * log_beta1)).to(tl.float32), mask=m)
    tl.store(p_row + CORRECTION2, (1.0 - tl.exp(b_step * log_beta2)).to(tl.float32), mask=m)
    b_one = tl.full([BLOCK], 1.0, tl.float64)
    tl.store(p_row + DECAY, (b_one - rate * weight_decay).to(tl.float32), mask=m)
    tl.store(p_row + ALPHA, (b_one * -rate * scale).to(tl.float32), mask=m)
    factor = tl.full([], 1.0, tl.float32)
    if grad_scale is not None:
        factor = tl.load(grad_scale).to(tl.float32)
    tl.store(p_row + GRAD_SCALE, b_one.to(tl.float32) * factor, mask=m)
    tl.store(p_row + ACTIVE, (b_one * active).to(tl.float32), mask=m)
    if draws is not None:
        tl.store(draws + o, tl.where(tl.abs(b_step) < 4611686018427387904.0, b_step, 0.0).to(tl.int64), mask=m)


def as_scalar(value, device):
    """A number or a 0-dim tensor as a 0-dim tensor on `device`, without synchronisation; what is not there yet becomes float64."""
    if isinstance(value, torch.Tensor) and value.device == device:
        return value.detach()
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _launch(steps, *, lr, beta1, beta2, weight_decay, scale=1.0, grad_scale=None, found_inf=None, advance, draws=False):
    count, device = steps.numel(), steps.device
    rows = torch.empty((count, SLOTS.value), dtype=torch.float32, device=device)
    numbers = torch.empty(count, dtype=torch.int64, device=device) if draws else None
    scalars_kernel[configs.cdiv(count, configs.SCALARS["BLOCK"]),](
        steps=steps,
        lr=as_scalar(lr, device),
        grad_scale=grad_scale,
        found_inf=found_inf,
        rows=rows,
        draws=numbers,
        count=count,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        weight_decay=float(weight_decay),
        scale=float(scale),
        ADVANCE=advance,
        **configs.SCALARS,
        **configs.OPTIONS,
    )
    return rows, numbers


def _log(beta):
    return math.log(beta) if beta > 0 else -math.inf


def read(steps, device, **options):
    """(rows, numbers) as of `advance`, of `steps` that are numbers or 0-dim tensors of any kind and only read."""
    values = [as_scalar(step, device) for step in steps]
    together = values[0].reshape(1) if len(values) == 1 else torch.stack([value.double() for value in values])
    return _launch(together, advance=False, **options)


def advance(steps, *, found_inf=None, **options):
    """Add one to `steps` (0-dim fp32, each matrix its own), or none where found_inf != 0.

    Returns the new (rows (count, SLOTS), their numbers (count,) if `draws` else None).
    """
    rows, numbers = _launch(torch.stack(steps), advance=True, found_inf=found_inf, **options)
    torch._foreach_add_(steps, 1 if found_inf is None else rows[0, ACTIVE.value])
    return rows, numbers
