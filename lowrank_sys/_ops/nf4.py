"""Weights in NF4 (Dettmers et al. 2023, QLoRA), and the linear layer on them.

A weight (m, n) is stored as packed (m, ⌈n/2⌉) uint8 and absmax (m, ⌈n/group_size⌉) fp32: one absmax for each group of `group_size`
neighbours of a row, the last of which may be short. Byte i of a row holds the code of element 2 i in its high nibble and that of
2 i + 1 in its low one, as bitsandbytes packs them; an odd row ends with the code of zero. An element's value is
absmax * LEVELS[code].
"""

import functools

import torch

from lowrank_sys._ops import coded
from lowrank_sys._ops.rules import define

PAIR = "Tensor packed, Tensor absmax"
SCHEMAS = {
    "quantize_nf4": "(Tensor weight, *, int group_size=64) -> (Tensor packed, Tensor absmax)",
    "dequantize_nf4": f"({PAIR}, *, SymInt n, int group_size=64, ScalarType? dtype=None) -> Tensor",
    # y = x Wᵀ + bias, and dx = dy W.
    "nf4_linear": f"(Tensor x, {PAIR}, Tensor? bias=None, *, int group_size=64) -> Tensor",
    "nf4_linear_backward": f"(Tensor grad_out, {PAIR}, *, SymInt n, int group_size=64) -> Tensor",
}

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: QLoRA's table, as bitsandbytes rounds it.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ZERO = LEVELS.index(0.0)

NF4 = coded.Coding("nf4", "packed", "absmax", torch.uint8, together=2, group_size=64)
check_quantize_nf4 = functools.partial(coded.check_quantize, NF4)
check_dequantize_nf4 = functools.partial(coded.check_dequantize, NF4)
check_nf4_linear = functools.partial(coded.check_linear, NF4)
check_nf4_linear_backward = functools.partial(coded.check_linear_backward, NF4)

define(SCHEMAS)
coded.register(NF4)
