"""The update of one matrix: W <- (1 - lr*weight_decay) W - rate [back(X) + c o phi], what every method comes down to."""

from typing import NamedTuple

import torch

from lowrank_sys.subspace.basis import axis_of, store_of


class Update(NamedTuple):
    """back(x) + c o phi + L N, or with `over` c o (back(x) + phi), of G (m, n) and R.

    x: of R's shape, fp32; None: no back-projection. phi: (m, n) any float dtype, e.g. G itself; None: none. c: factors of phi,
    each broadcast to (m, n): by channel, by row, of the matrix. sign: the sign of phi - back(taken) in place of phi. taken: R where
    `sign`. scale: 0-dim, that multiplies phi as it is read; None is 1. at: (flat indices (k,) int64, values (k,)) of entries that
    are these values instead. factors: (L (m, k), N (k, n)), fp32, of what is low-rank without a basis; None: none.

    What is linear in back(R) belongs in x: back(x) + c o (G - back(R)) = back(x - c o R) + c o G for c by channel.
    """

    x: torch.Tensor | None = None
    phi: torch.Tensor | None = None
    c: tuple = ()
    sign: bool = False
    taken: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    over: bool = False
    at: tuple = ()
    factors: tuple | None = None


class Change:
    """What is taken from a weight: an Update at its rate (0-dim), by panels of rows, so that none of it is of the weight's size."""

    def __init__(self, update, rate, state, shape, int8_gemm=False):
        self._update, self._rate, self._state, self._shape = update, rate, state, shape
        self._int8_gemm = int8_gemm
        self._basis = None

    def is_low_rank(self, param):
        """Whether it is back(x) alone, for a weight in rows."""
        update = self._update
        alone = update.phi is None and not update.c and not update.at and update.factors is None
        return alone and param.is_contiguous()

    @property
    def low_rank(self):
        """X at the rate, of R's shape, where the change is back(x) alone."""
        return self._update.x * self._rate

    def subtract_from(self, param):
        store_of(self._state).back_(param, self.low_rank, self._state, alpha=-1.0, int8_gemm=self._int8_gemm)

    def panel(self, first, end):
        """Rows first ... end - 1, fp32."""
        update, rows = self._update, slice(first, end)
        back = None if update.x is None else self._back(update.x, first, end)
        if update.phi is None:
            panel, back = back, None
        else:
            panel = self._phi(first, end)
            if update.over and back is not None:
                panel, back = panel + back, None
        for factor in update.c:
            panel = panel * (factor[rows] if factor.dim() == 2 and factor.shape[0] == self._shape[0] > 1 else factor)
        low_rank = None if update.factors is None else update.factors[0][rows] @ update.factors[1]
        panel, *others = (part for part in (panel, low_rank, back) if part is not None)
        for part in others:
            panel = panel + part
        if update.at:
            panel = self._put(panel, *update.at, first * self._shape[1])
        return panel * self._rate

    def _phi(self, first, end):
        """These rows of phi."""
        update = self._update
        panel = (update.phi[first:end] if self._shape else update.phi).float()
        if update.scale is not None:
            panel = panel * update.scale
        if update.sign:
            panel = (panel - self._back(update.taken, first, end)).sign()
        return panel

    def _put(self, panel, indices, values, begin):
        """A panel from flat index `begin` on with the values that lie in it; others add 0, so that no device is asked how many."""
        flat, here = panel.view(-1), indices - begin
        inside = (here >= 0) & (here < flat.numel())
        here = torch.where(inside, here, 0)
        return flat.index_add(0, here, torch.where(inside, values - flat[here], 0)).view_as(panel)

    def _back(self, x, first, end):
        """These rows of back(x)."""
        store = store_of(self._state)
        if self._basis is None:
            self._basis = store.ready(self._state, axis_of(self._shape, self._state))
        return store.back_rows(x, self._state, self._basis, self._shape, first, end, int8_gemm=self._int8_gemm)
