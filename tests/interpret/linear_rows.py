"""What the linear layers on quantized weights are tried on, and what they may be off by."""

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}
# (t, m, n, group_size): one element, odd sizes and short groups, whole tiles, several tiles of each axis, and so deep that the
# sum is split, along n and along m.
SHAPES = [
    (1, 1, 1, 32),
    (7, 33, 50, 32),
    (3, 20, 301, 64),
    (64, 64, 256, 256),
    (130, 144, 160, 32),
    (129, 80, 144, 128),
    (20, 24, 1601, 256),
    (70, 1616, 48, 32),
]


def check(got, a, w, bias):
    """The oracle in fp64, up to the rounding of W to a's type, fp32 sums and the result's rounding."""
    a, w = a.double(), w.double()
    want = a @ w + (0 if bias is None else bias.double())
    size = a.abs() @ w.abs() + 1
    # The interpreter truncates W, which costs a whole unit in the last place.
    product = 2 * EPS[got.dtype] if got.dtype != FP32 else 2.0**-22 * w.shape[0] ** 0.5
    error = (got.double() - want).abs()
    assert (error <= product * size + EPS[got.dtype] * want.abs()).all(), error.max()
