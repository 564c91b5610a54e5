"""Flora (Hao et al., ICML 2024, arXiv:2402.03293): momentum compressed by a random projection that is drawn anew, in Adafactor."""

import math

import torch

from lowrank_sys.optim.moments import Moment
from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import Remainder
from lowrank_sys.optim.rules.adafactor import Adafactor, inverse_root
from lowrank_sys.optim.update import Update
from lowrank_sys.subspace.basis import store_of
from lowrank_sys.subspace.keys import Resampled


class CompressedMomentum(Adafactor):
    """X = M <- beta1 M + (1 - beta1) R; rates, and all without a rank, are Adafactor's."""

    name, transports, sharded = None, ("rotate", "keep", "reset"), True
    defaults = {**Adafactor.defaults, "beta1": 0.9}
    plain = Adafactor()

    def moments(self, shape, h):
        return {"exp_avg": Moment(signed=True)}

    def rates(self, lr, s, h):
        return (self.rate(lr, s, h),) * 2

    def update(self, r, s, h):
        s.exp_avg.lerp_(r, 1 - h["beta1"])
        return s.exp_avg.clone()


class FactoredRoot(Remainder):
    """back(X) over the root of Adafactor's factored second moments, clipped by its RMS, times `scale`.

    They are G's, or where a step starts from R those of back(R). State of a matrix: `row` (m, 1) and `col` (1, n), fp32.
    """

    name, defaults, categories = "factored-root", {"scale": 1.0}, {"row": "moments", "col": "moments"}
    basis, reads, sharded, by_row = True, ("decay_rate", "clip_threshold"), True, ("row",)

    def sums(self, h):
        return True

    def init(self, state, param):
        for key, shape in (("row", (param.shape[0], 1)), ("col", (1, param.shape[1]))):
            state[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)

    def of(self, g, r, x, s, state, h):
        left, b = state["left"], store_of(state).load(state, s.d).float()
        norms = self._back_norms(b, r, left) if g is None else self._norms(g, s)
        beta2, (m, n) = 1 - s.step ** h["decay_rate"], (s.shard.rows or len(state["row"]), state["col"].shape[1])
        taken = s.shard.any(s.ok.any())
        for key, norm, count in (("row", norms[0], n), ("col", s.shard.norms(norms[1]), m)):
            square = norm.square() / count + h["eps"][0]  # where an entry is not finite the statistic stays
            state[key].copy_(torch.where(taken & square.isfinite(), beta2 * state[key] + (1 - beta2) * square, state[key]))
        rows, columns = (s.shard.sum(state["row"].sum()) / m).sqrt() * inverse_root(state["row"]), inverse_root(state["col"])
        turned, low = (b * rows, x * columns) if left else (b * columns.T, (x * rows).T)
        rms = s.shard.sum((low * (turned.T @ turned @ low)).sum()).clamp(min=0).sqrt() / math.sqrt(m * n)
        return Update(x=x, c=(rows * h["scale"] / (rms / h["clip_threshold"]).clamp(min=1), columns), over=True)

    def _norms(self, g, s):
        """Those of the rows (m, 1) and of the columns (1, n) of G."""
        norms = [torch.ops.lowrank.channel_norms(g, left=left).unsqueeze(0 if left else 1) for left in (False, True)]
        return norms if s.grad_scale is None else [norm * s.grad_scale for norm in norms]

    def _back_norms(self, b, r, left):
        """Those of back(R); by channel R_jᵀ (BᵀB) R_j."""
        r = r if left else r.T
        inside, outside = ((b @ (r @ r.T)) * b).sum(1), ((b.T @ b @ r) * r).sum(0)
        rows, columns = (inside, outside) if left else (outside, inside)
        return rows.clamp(min=0).sqrt().unsqueeze(1), columns.clamp(min=0).sqrt().unsqueeze(0)


@method("flora", lr=3e-4, plain_lr=3e-3, scale=1.0, update_proj_gap=1000)
class Flora(Preset):
    """W <- (1 - lr*wd) W - lr U, U = back(M) / sqrt(V), V Adafactor's, M the momentum of R = project(G) (docs/methods.md)."""

    rule, subspace, remainder = CompressedMomentum(), Resampled(), FactoredRoot()
