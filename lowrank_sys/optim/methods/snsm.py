"""SNSM (Nguyen and Nguyen 2024, arXiv:2411.07120): momentum in a subspace, the raw gradient outside, one step size a subset."""

import torch

from lowrank_sys.optim.moments import Moment
from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import Remainder
from lowrank_sys.optim.rules import Adam, Rule
from lowrank_sys.optim.rules.adam import corrections
from lowrank_sys.optim.update import Update


class SubspaceMomentum(Rule):
    """X = M <- beta1 M + (1 - beta1) R, at the rate lr sqrt(1 - beta2^t) / (1 - beta1^t)."""

    sharded = True
    defaults = {"betas": (0.9, 0.999), "eps": 1e-6}
    state = {"exp_avg": Moment(signed=True)}
    plain = Adam()

    def rates(self, lr, s, h):
        first, second = corrections(s, h)
        return lr, lr * (second.sqrt() / first)

    def update(self, r, s, h):
        s.exp_avg.lerp_(r, 1 - h["betas"][0])
        return s.exp_avg.clone()


class SubsetNorm(Remainder):
    """G - back(R) as it is; all of the update over the root of V, the moving average of |G_c|² by channel, times `scale`.

    State of a matrix: `subset_sq` (1, n) of a basis on the left, (m, 1) on the right, fp32.
    """

    name, defaults, categories, from_low_rank = "subset-norm", {"scale": 1.0}, {"subset_sq": "moments"}, False
    alone = basis = True
    reads, sharded, by_row = ("betas", "eps"), True, ("subset_sq",)

    def init(self, state, param):
        shape = (1, param.shape[1]) if state["left"] else (param.shape[0], 1)
        state["subset_sq"] = torch.zeros(shape, dtype=torch.float32, device=param.device)

    def measure(self, g, r, s, state, h):
        norms = torch.ops.lowrank.channel_norms(g, left=state["left"]).reshape(state["subset_sq"].shape)
        s.squares = (norms if s.grad_scale is None else norms * s.grad_scale).square()
        return s.squares.isfinite()

    def of(self, g, r, x, s, state, h):
        v, beta2 = state["subset_sq"], h["betas"][1]
        v.copy_(torch.where(s.ok, beta2 * v + (1 - beta2) * s.squares, v))
        c = h["scale"] / (v.sqrt() + h["eps"])
        return Update(x=c * (x - r), phi=g, scale=s.grad_scale, c=(c,))


@method("snsm", lr=1e-2, plain_lr=3e-3, scale=1.0)
class SNSM(Preset):
    """W <- (1 - lr*wd) W - a [G - back(R) + back(M)] / (sqrt(V) + eps), a = lr sqrt(1 - beta2^t) / (1 - beta1^t).

    A row of a tall matrix, or a column of a wide one, shares one V: the sum of its squares, so that rates are larger than Adam's by
    about the root of its length. Group keys: those of GaLoreAdamW; `scale` (1), `moments` (clear: M begins anew in each basis, and
    V stays; keep, rotate). State of a matrix: `exp_avg` fp32 (r, n) or (m, r), `subset_sq`, `basis`, `step`, the schedule.
    """

    rule, remainder = SubspaceMomentum(), SubsetNorm()
    low_rank_defaults = {"moments": "clear"}
