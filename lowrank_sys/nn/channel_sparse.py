"""ChannelSparseLinear: W = gamma B A + (1 - gamma) S, S whole columns (LOST, Li et al. 2025, arXiv:2508.02668)."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowrank_sys.nn.factored import FactoredLinear, check_share, entries, flat

gather, scatter_add_ = torch.ops.lowrank.gather_rows, torch.ops.lowrank.scatter_add_rows_


class _Linear(torch.autograd.Function):
    """y = gamma B A x + (1 - gamma) S x, in products with the factors; x alone is kept."""

    @staticmethod
    def forward(ctx, x, b, a, values, columns, gamma):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, b, a, values, columns)
        ctx.gamma = gamma
        rows = flat(x).contiguous()
        b, a, values = (w.to(x.dtype) for w in (b, a, values))
        y = torch.mm(rows @ a.T, b.T).mul_(gamma)
        y.addmm_(gather(rows, columns, None, left=False).to(x.dtype), values.T, alpha=1 - gamma)
        return y.reshape(*x.shape[:-1], b.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, *factors, columns = ctx.saved_tensors
        dy, dtype = flat(grad_out), grad_out.dtype
        b, a, values = (w.to(dtype) for w in factors)
        dx, grads = None, [None] * 3
        through = dy @ b  # (tokens, r)
        if ctx.needs_input_grad[0]:
            dx = torch.mm(through, a).mul_(ctx.gamma)
            scatter_add_(dx, (dy @ values).float(), columns, None, alpha=1 - ctx.gamma, left=False)
            dx = dx.reshape(*grad_out.shape[:-1], a.shape[1])
        if x is not None:
            rows = flat(x).contiguous()
            chosen = gather(rows, columns, None, left=False).to(dtype)
            grads = [
                torch.mm(dy.T, rows @ a.T).mul_(ctx.gamma),
                torch.mm(through.T, rows).mul_(ctx.gamma),
                torch.mm(dy.T, chosen).mul_(1 - ctx.gamma),
            ]
            grads = [grad.to(w.dtype) for grad, w in zip(grads, factors)]
        return dx, *grads, None, None


class ChannelSparseLinear(FactoredLinear):
    """y = gamma B A x + (1 - gamma) S x + b: the dominant part of a weight in factors, and whole columns of what they leave.

    `values` (out, k) are the columns of S that are there, `columns` (k,) int32 which they are. The products are with the factors
    and with these columns: no matrix of W's size is made. Differentiable once.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear, whose weight is drawn and then taken apart.
        rank: r of B (out, r) and A (r, in).
        density: the share of W's columns that S has.
        gamma: the weight of the factors, above 0 and below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, density: float = 0.03, gamma: float = 0.5,
    ) -> None:  # fmt: skip
        check_share("density", density)
        check_share("gamma", gamma)
        columns = torch.arange(entries(density, in_features))
        super().__init__(in_features, out_features, rank, bias, columns, (out_features, len(columns)), device, dtype)
        self.scale = gamma
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw a weight and a bias as nn.Linear does, and take the weight apart."""
        if self.B.is_meta:
            return
        self.take_apart_(nn.Linear(self.in_features, self.out_features, False, device=self.B.device).weight)
        self.reset_bias()

    @torch.no_grad()
    def take_apart_(self, weight):
        """Take over the dominant part of `weight` (out, in) and the columns of the rest.

        With U Σ Vᵀ of the weight: B = U_r sqrt(Σ_r), A = sqrt(Σ_r) V_rᵀ, and S the columns of largest norm of the other singular
        values' part.
        """
        w = weight.detach().float()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = s[: self.rank].sqrt()
        b, a = u[:, : self.rank] * root, root[:, None] * vh[: self.rank]
        rest = w - b @ a
        columns = rest.norm(dim=0).topk(len(self.columns)).indices.sort().values
        for own, new in ((self.B, b), (self.A, a), (self.values, rest[:, columns]), (self.columns, columns)):
            own.copy_(new)

    @torch.no_grad()
    def dense(self, dtype=None):
        """W (out, in), in `dtype` or that of the factors."""
        w = torch.mm(self.B.float(), self.A.float()).mul_(self.scale)
        w.index_add_(1, self.columns, self.values.float(), alpha=1 - self.scale)
        return w.to(dtype or self.B.dtype)

    def forward(self, x):
        return self.plus_bias(_Linear.apply(self.cast(x), self.B, self.A, self.values, self.columns, self.scale))
