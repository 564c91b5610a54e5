"""What fp32 arithmetic may be off by, derived from the arguments: values in fp64, each with a bound of its error.

Nothing here is tuned. Where fp32 may overflow on the way the bound is infinite and any result passes; where the exact value
is NaN or beyond the type, the result must not be finite.
"""

from typing import NamedTuple

import torch

UNIT = 2.0**-24  # an fp32 operation is off by this share of its result,
TINY = 2.0**-149  # or by this much, where the result is subnormal
MAX = torch.finfo(torch.float32).max
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINIES = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Near(NamedTuple):
    """fp64 values and the largest errors that fp32 arithmetic may have made."""

    value: torch.Tensor
    error: torch.Tensor

    def select(self, ok, other):
        """self where ok, else `other` without an error."""
        return Near(torch.where(ok, self.value, other.double()), torch.where(ok, self.error, 0.0))

    def fits(self, error):
        """self with `error`, infinite where a value may leave fp32."""
        error = error.nan_to_num(torch.inf, torch.inf)
        return Near(self.value, torch.where(self.value.abs() + error < MAX, error, torch.inf))


def exact(tensor):
    return Near(tensor.double(), torch.zeros(tensor.shape, dtype=torch.float64))


def scaled(factor, a, operations=2):
    """factor * a for a Python number that is rounded to fp32 first; as in BLAS, 0 * a need not look at a."""
    if factor == 0:
        return Near(torch.zeros_like(a.value), torch.where(a.value.isfinite() & a.error.isfinite(), 0.0, torch.inf).double())
    value = factor * a.value
    return Near(value, value).fits(abs(factor) * a.error * (1 + 8 * UNIT) + operations * UNIT * value.abs() + TINY)


def added(a, b, sums=1):
    """a + b; in `sums` roundings where b's own sum begins at a."""
    value = a.value + b.value
    size = a.value.abs() + a.error + b.value.abs() + b.error
    return Near(value, value).fits(a.error + b.error + sums * (UNIT * size + TINY))


def product(a, b):
    """a @ b, summed in any order."""
    depth = a.value.shape[-1]
    value, size = a.value @ b.value, a.value.abs() @ b.value.abs()
    inherited = a.error @ b.value.abs() + a.value.abs() @ b.error + a.error @ b.error
    error = inherited + (depth + 2) * (UNIT * size + TINY)
    return Near(value, torch.where(size < MAX, Near(value, value).fits(error).error, torch.inf))


def adam(g, m, v, *, step, beta1, beta2, eps, **_):
    """Balls of the new moments and of m̂ / (sqrt(v̂) + eps)."""
    new_m = added(scaled(beta1, exact(m)), scaled(1 - beta1, g))
    # (1 - beta2) * g first, so that only a subnormal factor loses digits to the second one.
    square = g.value.square()
    error = (1 - beta2) * (2 * g.value.abs() * g.error + g.error.square()) + 4 * UNIT * (1 - beta2) * square
    square = Near((1 - beta2) * square, square).fits(error + TINY * (1 + g.value.abs()))
    new_v = added(scaled(beta2, exact(v)), square)
    mean = scaled(1 / (1 - beta1**step), new_m, operations=3)
    variance = scaled(1 / (1 - beta2**step), new_v, operations=3)
    low, high = (
        (variance.value + sign * variance.error).clamp(min=0).sqrt() * (1 + sign * UNIT) + eps * (1 + 2 * sign * UNIT)
        for sign in (-1, 1)
    )
    update = mean.value / (variance.value.sqrt() + eps)
    corners = torch.stack([(mean.value + sign * mean.error) / bottom for sign in (-1, 1) for bottom in (low, high)])
    error = (corners - update).abs().amax(0) + 4 * UNIT * update.abs() + TINY
    return new_m, new_v, Near(update, update).fits(error)


def decayed(param, update, *, lr, weight_decay, scale=1.0, sums=1, **_):
    """(1 - lr*weight_decay) W - lr*scale*update."""
    return added(scaled(1 - lr * weight_decay, exact(param)), scaled(-lr * scale, update, operations=3), sums)


def assert_within(name, got, near, places=1):
    """`got` is `near`, rounded to its own dtype, `places` halves of its last place off at most."""
    value, unit, most = near.value, places * UNITS[got.dtype], torch.finfo(got.dtype).max
    assert got.shape == value.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(value.shape)}"
    error = near.error + unit * (value.abs() + near.error) + TINIES[got.dtype]
    got = got.double()
    free = ~(value.abs() + error < most) & value.isfinite()
    beyond = ~value.isfinite() | (value.abs() - error > most * (1 + unit))
    wrong = torch.where(beyond, got.isfinite(), ~free & ~((got - value).abs() <= error))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{name}{list(at)}: {got[at]:.9g}, expected {value[at]:.9g} within {error[at]:.3g}")
