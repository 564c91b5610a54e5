"""Linear layers whose weight is two factors and a sparse matrix, W = scale B A + S, and never a matrix of its size for long."""

import math

import torch
from torch import nn

from lowrank_sys._ops import FLOATS

# Elements of W, or of its gradient, that exist at once: rows enough to fill a card, or for a CPU's GEMM.
MOST = {"cpu": 1 << 20}
MOST_ELSEWHERE = 1 << 24


class FactoredLinear(nn.Module):
    """y = x Wᵀ + b with W = scale B A + S. What the layers that are low-rank and sparse have in common.

    Parameters: `B` (out, r), `A` (r, in), `values` of S, `bias` (out) or None. Buffer: `columns`, int32, where the values are.
    """

    scale: float

    def __init__(self, in_features, out_features, rank, bias, columns, values, device, dtype):
        super().__init__()
        most = min(in_features, out_features)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
            raise ValueError(f"rank must be an integer from 1 to {most}, got {rank!r}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(values, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("columns", columns.to(device=device, dtype=torch.int32))

    def reset_bias(self):
        """Draw it as nn.Linear does."""
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.in_features))
            nn.init.uniform_(self.bias, -bound, bound)

    def dense(self, dtype=None):
        """W (out, in), in `dtype` or that of the factors."""
        raise NotImplementedError

    def cast(self, x):
        """x as a linear layer takes it under autocast."""
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def plus_bias(self, y):
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


def check_share(name, share):
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {share!r}")


def entries(share, whole):
    """How many of `whole` a share is, at least one."""
    return max(1, round(share * whole))


def parts(out_features, in_features, device):
    """Slices of rows of a weight (out, in), each few enough to be made at once on `device`."""
    high = max(1, MOST.get(device.type, MOST_ELSEWHERE) // max(1, in_features))
    return [slice(first, min(first + high, out_features)) for first in range(0, out_features, high)]


def flat(x):
    """x (..., k) as (tokens, k)."""
    return x.reshape(-1, x.shape[-1])
