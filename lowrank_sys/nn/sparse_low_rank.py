"""SparseLowRankLinear: W = scale B A + S with S on a fixed random support (SLTrain, Han et al. 2024, arXiv:2406.02214)."""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowrank_sys.nn.factored import FactoredLinear, check_share, entries, flat, parts

product = torch.ops.lowrank.scatter_add_product


class _Linear(torch.autograd.Function):
    """y = x Wᵀ, some rows of W at a time; backward makes them anew, and as many rows of W's gradient."""

    @staticmethod
    def forward(ctx, x, b, a, values, columns, scale):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, b, a, values, columns)
        ctx.scale = scale
        rows = flat(x)
        y = x.new_empty(rows.shape[0], b.shape[0])
        for part in parts(b.shape[0], a.shape[1], x.device):
            w = product(b[part], a, values[part], columns[part], scale=scale, dtype=x.dtype)
            torch.mm(rows, w.T, out=y[:, part])
        return y.reshape(*x.shape[:-1], b.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, b, a, values, columns = ctx.saved_tensors
        dy, dtype = flat(grad_out), grad_out.dtype
        wide = torch.promote_types(dtype, torch.float32)
        dx = db = da = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_zeros(dy.shape[0], a.shape[1], dtype=wide)
        if x is not None:
            db, dvalues, da = torch.empty_like(b), torch.empty_like(values), a.new_zeros(a.shape, dtype=wide)
        for part in parts(b.shape[0], a.shape[1], dy.device):
            if dx is not None:
                dx += dy[:, part] @ product(b[part], a, values[part], columns[part], scale=ctx.scale, dtype=dtype)
            if x is not None:
                dw = dy[:, part].T @ flat(x)
                dvalues[part] = dw.gather(1, columns[part].long())
                db[part] = ctx.scale * (dw @ a.to(dtype).T)
                da += ctx.scale * (b[part].to(dtype).T @ dw)
        if dx is not None:
            dx = dx.to(dtype).reshape(*grad_out.shape[:-1], a.shape[1])
        if x is not None:
            da = da.to(a.dtype)
        return dx, db, da, dvalues, None, None


class SparseLowRankLinear(FactoredLinear):
    """y = x Wᵀ + b with W = alpha/rank B A + S: low-rank, and sparse on a random support that stays as it is.

    Forward makes some rows of W at a time and keeps none: for backward there are x and the parameters. Every row of S has
    round(density * in_features) entries, so that a part of the rows is a part of `values` and `columns` (out, entries), int32.
    Under autocast x is cast as for nn.Linear; W is made in x's type. Differentiable once.

    Drawn as the authors do: B = 0, A uniform as nn.Linear's weight, the values uniform in ±1/sqrt(in_features).

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        rank: r of B (out, r) and A (r, in).
        density: the share of W's elements that S has.
        alpha: scale = alpha / rank.
        generator: of the support, on the CPU.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, density: float = 0.03, alpha: float = 32.0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        check_share("density", density)
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
        columns = draw_columns(out_features, in_features, entries(density, in_features), generator)
        super().__init__(in_features, out_features, rank, bias, columns, columns.shape, device, dtype)
        self.scale = alpha / rank
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw factors, values and bias; the support stays."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        nn.init.zeros_(self.B)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.uniform_(self.values, -bound, bound)
        self.reset_bias()

    @torch.no_grad()
    def dense(self, dtype=None):
        """W (out, in), in `dtype` or that of the factors."""
        return product(self.B, self.A, self.values, self.columns, scale=self.scale, dtype=dtype)

    def forward(self, x):
        return self.plus_bias(_Linear.apply(self.cast(x), self.B, self.A, self.values, self.columns, self.scale))


def draw_columns(m, n, k, generator=None):
    """k different columns of n in each of m rows, rising: int32 (m, k). A row at a time, for memory of W's size is not there."""
    rows = [torch.randperm(n, generator=generator)[:k].sort().values.int() for _ in range(m)]
    return torch.stack(rows) if rows else torch.empty(0, k, dtype=torch.int32)
