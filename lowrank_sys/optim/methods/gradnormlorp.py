"""GradNormLoRP (Huang et al., AAAI 2025, arXiv:2412.19616): rows of a weight as a length and a direction, the latter low-rank."""

import torch

from lowrank_sys._ops.numerics import usable
from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import Remainder
from lowrank_sys.optim.rules import Adam
from lowrank_sys.optim.rules.adam import corrections
from lowrank_sys.optim.update import Change, Update
from lowrank_sys.optim.weight import panels
from lowrank_sys.subspace.basis import store_of


class NormalisedRows(Remainder):
    """W_i <- g_i V_i / |V_i| with V = W - lr scale back(X) and g_i = |W_i| - lr Adam(G_i . W_i / |W_i|), by rows i.

    State of a matrix: `length`, `length_sq` (m, 1) fp32, the moments of the lengths.
    """

    name, defaults = "normalised-rows", {"scale": 0.25}
    categories, from_low_rank = dict.fromkeys(("length", "length_sq"), "moments"), False
    basis, reads, sharded, by_row = True, ("betas", "eps"), True, ("length", "length_sq")

    def sums(self, h):
        return True

    def init(self, state, param):
        for name in self.categories:
            state[name] = torch.zeros((param.shape[0], 1), dtype=torch.float32, device=param.device)

    def measure(self, g, r, s, state, h):
        """|W_i| and the gradient of that length, without entries that cannot be used."""
        s.lengths, s.slopes = torch.empty_like(state["length"]), torch.empty_like(state["length"])
        for first, end in panels(g.shape):
            rows = slice(first, end)
            w, part = s.weight[rows], g[rows].float() if s.grad_scale is None else g[rows].float() * s.grad_scale
            s.lengths[rows] = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            s.slopes[rows] = (torch.where(usable(part), part, 0) * w).sum(1, keepdim=True)
        s.slopes = torch.where(s.lengths > 0, s.slopes / s.lengths, 0)

    def of(self, g, r, x, s, state, h):
        taken, (beta1, beta2) = s.shard.any(s.ok.any()), h["betas"]
        for name, beta, value in (("length", beta1, s.slopes), ("length_sq", beta2, s.slopes.square())):
            state[name].copy_(torch.where(taken, beta * state[name] + (1 - beta) * value, state[name]))
        first, second = (correction.to(r.dtype) for correction in corrections(s, h))
        step = (state["length"] / first) / ((state["length_sq"] / second).sqrt() + h["eps"])
        x, shape = x * h["scale"], g.shape
        change, moved = Change(Update(x=x), s.rate, state, shape), torch.empty_like(s.lengths)
        for start, end in panels(shape):
            moved[start:end] = torch.linalg.vector_norm(s.weight[start:end] - change.panel(start, end), dim=1, keepdim=True)
        to = torch.where(moved > 0, (s.lengths - s.rate * step) / moved, 1)
        shrink = torch.where(s.rate > 0, (1 - to) / s.rate, 0)  # of W, whose change is multiplied by the rate
        if not state["left"]:
            return Update(x=to * x, phi=s.weight, c=(shrink,))
        basis = store_of(state).load(state, shape[0]).float()
        return Update(phi=s.weight, c=(shrink,), factors=(to * basis, x))


@method("gradnormlorp", lr=5e-3, plain_lr=3e-3)
class GradNormLoRP(Preset):
    """GaLoreAdamW on the directions of rows, AdamW on their lengths: W = g V / |V|, and both begin every step as W has them.

    Nothing of V and g is kept: the length of V means nothing. The authors' code keeps both in full. Of the gradient of V it leaves
    out the part along V, as here: normalising takes back what that does. Group keys: those of GaLoreAdamW.
    State of a matrix: that of GaLoreAdamW, and 2m numbers.
    """

    rule, remainder = Adam(), NormalisedRows()
