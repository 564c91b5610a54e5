"""What happens to the part of the gradient that the subspace does not hold, G - back(R), or to a gradient without a subspace.

A remainder declares its group keys (`defaults`), keeps what it needs in the state (`categories`), and says what the update is.
"""

import math

import torch

from lowrank_sys._ops.numerics import usable
from lowrank_sys.optim.rules.adam import corrections
from lowrank_sys.optim.update import Update
from lowrank_sys.optim.weight import panels
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.select import gram_of
from lowrank_sys.subspace.shards import Part

# A norm may grow by this factor a step (Fira, section 3.3; APOLLO, section 4.2).
GROWTH = 1.01
# Beside norms that divide, as the papers' code has it.
TINY = 1e-8
OVERFLOW = 2.0**128


class Remainder(Part):
    """It is dropped, as in GaLore.

    name: in the table of fused steps. from_low_rank: whether a step needs nothing of G but R. by_row: what it keeps of a weight's
    rows, by its names in a state. basis: whether it is for matrices with a basis (True), without (False), or for both (None).
    needs: keys of the state that it reads of the subspace's. reads: group keys that it reads of the rule's. reads_update: whether
    its update is of X. alone: whether it moves a matrix of whose gradient nothing is in R.
    """

    name, sharded, by_row = "none", True, ()
    defaults = {"scale": 0.25}
    categories = {}
    from_low_rank = reads_update = True
    basis, needs, reads, alone = None, (), (), False
    feeds_back = False  # whether `before` is anything
    begins = False  # whether `begin` is anything
    keys = {"scale"}  # group keys of all remainders

    def __init_subclass__(cls):
        super().__init_subclass__()
        Remainder.keys |= cls.defaults.keys()

    @property
    def whole(self):
        """What serves a matrix without a basis: R is G there, and nothing remains."""
        return WHOLE

    def check(self, group):
        """Raise a ValueError that names a key with a value that is none."""

    def sums(self, h):
        """Whether its update takes sums over the rows of a weight, by `s.shard`."""
        return False

    def options(self, h):
        """What the fused step takes of the group's keys, by its names."""
        return {"scale": h["scale"]}

    def init(self, state, param):
        """Add this part's state for a matrix."""

    def before(self, g, state, scale, go):
        """(the gradient that the step uses in place of g (m, n), which of its channels are usable or None for all).

        What is returned in place of g has been multiplied by `scale` (0-dim or None). Where `go` (0-dim bool or None) is False the
        step is none, and nothing may change.
        """
        return g, None

    def begin(self, g, state):
        """The first basis of a matrix has been chosen, from G (m, n)."""

    def measure(self, g, r, s, state, h):
        """Keep in s, before the rule runs, the sums that `of` needs; which channels have usable ones (bool), or None for all."""

    def partial(self, r, x, s, state, h):
        """Sums over the rows that are here, a vector, of which `of` finds those over all rows in `s.sums`, or None. Where rows lie
        on several processes, those of many matrices are one message."""

    def of(self, g, r, x, s, state, h):
        """The Update of G (None where the step starts from R), R and X = rule(R): x is a tensor of R's shape, zero where not s.ok.

        s: the rule's moments, s.step, s.ok, s.d (the projected axis), and s.grad_scale, 0-dim or None, that R has and G has not.
        h: the group.
        """
        return Update(x=x * h["scale"])

    def after(self, g, r, state):
        """The step was taken; r is zero where it was none."""


class Whole(Remainder):
    """Of a gradient without a subspace: the update is the rule's own."""

    defaults, sharded = {}, True

    def of(self, g, r, x, s, state, h):
        return Update(phi=x)


class WithoutBasis(Remainder):
    """Base of those that make their update of a whole gradient."""

    defaults, from_low_rank, basis = {}, False, False

    @property
    def whole(self):
        return self


WHOLE = Whole()


class _FromGradient(Remainder):
    from_low_rank, basis = False, True


def _axis(state):
    """The axis that a channel runs along."""
    return 0 if state["left"] else 1


def _squares(x, state):
    return (x * x).sum(_axis(state), keepdim=True)


def _gradient_squares(g, s, state):
    """|G_c|² of every channel, as R has it."""
    norms = torch.ops.lowrank.channel_norms(g, left=state["left"]).unsqueeze(_axis(state))
    return (norms if s.grad_scale is None else norms * s.grad_scale).square()


def limit(norm, limiter):
    """What the scaled gradient is divided by, so that its norm grows by at most GROWTH a step; 0 in `limiter` is no norm yet."""
    known = (limiter > 0) & (norm > 0)
    divisor = torch.where(known, (norm / (limiter + TINY)).clamp(min=GROWTH) / GROWTH, 1.0)
    limiter.copy_(torch.where(norm > 0, norm / divisor, limiter))
    return divisor


class _Scaled(_FromGradient):
    """Channels are scaled by |X_c| / |R_c|, and the norm of the result is limited."""

    categories = {"limiter": "counters"}
    limited = True

    def init(self, state, param):
        if self.limited:
            state["limiter"] = torch.zeros((), dtype=torch.float32, device=param.device)

    def sums(self, h):
        return self.limited or self._is_whole(h)

    def measure(self, g, r, s, state, h):
        s.r_squares = _squares(r, state)
        ok = s.r_squares < OVERFLOW
        if self.limited:
            s.g_squares = _gradient_squares(g, s, state)
            ok = ok & (s.g_squares < OVERFLOW)
        return ok

    # What the matrix's own keys ask for, of ScaledGradient and of ScaledResidual: one c for the matrix; a factor of c that the
    # limiter sees; how much of back(R) is taken from G.

    def _is_whole(self, h):
        return h.get("scale_type") == "tensor"

    def _front(self, h):
        return 1.0

    def _taken(self, h):
        return 0.0

    def partial(self, r, x, s, state, h):
        """c by channel in s.c; sums in fp64. The limiter's norm is that of c o (G - alpha back(R)), by channel
        |G|² - 2 alpha |R|² + alpha² Rᵀ(BᵀB)R."""
        alpha, whole = self._taken(h), self._is_whole(h)
        r_squares, x_squares = torch.where(s.ok, s.r_squares, 0), _squares(x, state)
        sums = [x_squares.sum(), r_squares.sum()] if whole else []
        s.c = x_squares.sqrt() / (r_squares.sqrt() + TINY) * self._front(h)
        if self.limited:
            inside = r_squares if alpha == 0 else self._inside(r, r_squares, s, state, h)
            squares = (torch.where(s.ok, s.g_squares, 0) - 2 * alpha * r_squares + alpha**2 * inside).clamp(min=0)
            sums.append(((1 if whole else s.c * s.c) * squares).double().sum())
        return torch.stack([total.double() for total in sums]) if sums else None

    def coefficients(self, r, s, state, h):
        """c, over the limiter's divisor."""
        c, norm = s.c, None if s.sums is None else s.sums[-1].sqrt()
        if self._is_whole(h):
            x_norm, r_norm = s.sums[:2].to(r.dtype).sqrt()
            factor = x_norm / (r_norm + TINY) * self._front(h)
            c, norm = factor.expand_as(c), norm * factor
        return (c / limit(norm, state["limiter"]) if self.limited else c).to(r.dtype)

    def _inside(self, r, r_squares, s, state, h):
        """Rᵀ (BᵀB) R by channel."""
        gram = gram_of(state, s.d, h)
        return r_squares if gram is None else (r * (gram @ r if state["left"] else r @ gram)).sum(_axis(state), keepdim=True)


class ScaledGradient(_Scaled):
    """APOLLO: no back-projection, the whole gradient is scaled by channel (or as one) as the rule would scale R.

    Group keys: `scale`, `scale_type` ('channel' | 'tensor'). State of a matrix: `limiter`, the norm of the last update.

    Args:
        front: whether sqrt(scale) comes before the limiter.
        limited: whether the norm of an update is limited at all.
    """

    name, sharded = "scaled-gradient", True
    defaults = {"scale": 1.0, "scale_type": "channel"}

    def __init__(self, front=False, limited=True):
        self.front, self.limited = front, limited

    def check(self, group):
        if group["scale_type"] not in ("channel", "tensor"):
            raise ValueError(f"scale_type must be one of channel, tensor, got {group['scale_type']!r}")

    def options(self, h):
        return {"scale": h["scale"], "per_tensor": self._is_whole(h), "scale_front": self.front, "growth": GROWTH}

    def _front(self, h):
        return math.sqrt(h["scale"]) if self.front else 1.0

    def of(self, g, r, x, s, state, h):
        c = self.coefficients(r, s, state, h)
        return Update(phi=g, scale=s.grad_scale, c=(c if self.front else c * math.sqrt(h["scale"]),))


class ScaledResidual(_Scaled):
    """Fira: it is scaled by channel as the rule scales R, and its norm is limited.

    Group key: `alpha`, the factor of back(). State of a matrix: `limiter`, the norm of the last scaled residual.

    Args:
        exact: whether it is G - back(R), as in the paper, or G - alpha back(R), as in the authors' code.
    """

    name, sharded = "scaled-residual", True
    defaults = {"alpha": 0.25}

    def __init__(self, exact=False):
        self.exact = exact
        self.name = "exact-scaled-residual" if exact else self.name

    def options(self, h):
        return {"scale": h["alpha"], "growth": GROWTH}

    def _taken(self, h):
        return 1.0 if self.exact else h["alpha"]

    def of(self, g, r, x, s, state, h):
        c = self.coefficients(r, s, state, h)
        x = h["alpha"] * x - c * r if self.exact else h["alpha"] * (x - c * r)
        return Update(x=x, phi=g, scale=s.grad_scale, c=(c,))


class StateFree(_FromGradient):
    """FRUGAL: it takes a step without a state, signSGD or SGD.

    Group keys: `scale`, of the step in the subspace; `residual_scale`, of the other.
    """

    name, sharded, alone = "state-free", True, True
    defaults = {"scale": 1.0, "residual_scale": 1.0}

    def __init__(self, sign=True):
        self.sign = sign

    def options(self, h):
        return {"scale": h["scale"], "residual_scale": h["residual_scale"], "sign": self.sign}

    def measure(self, g, r, s, state, h):
        if store_of(state).reads_all:  # what is not finite is in R
            return None
        return torch.ops.lowrank.channel_norms(g, left=state["left"]).unsqueeze(_axis(state)).isfinite()

    def of(self, g, r, x, s, state, h):
        c = (torch.full_like(s.step, h["residual_scale"]),)
        if self.sign:
            return Update(x=x * h["scale"], phi=g, scale=s.grad_scale, c=c, sign=True, taken=r)
        return Update(x=x * h["scale"] - h["residual_scale"] * r, phi=g, scale=s.grad_scale, c=c)


class ErrorFeedback(Remainder):
    """What R leaves of the gradient is added to the next one. State of a matrix: `error`, of the weight's shape and dtype."""

    name, defaults, categories = "error-feedback", {"scale": 1.0}, {"error": "moments"}
    from_low_rank, basis, feeds_back, sharded, by_row = False, True, True, True, ("error",)

    def init(self, state, param):
        state["error"] = torch.zeros(param.shape, dtype=param.dtype, device=param.device)

    def before(self, g, state, scale, go):
        error, axis = state["error"], 0 if state["left"] else 1
        ok = torch.ops.lowrank.channel_norms(g, left=state["left"]).isfinite().unsqueeze(axis)
        for first, end in panels(g.shape):
            part = g[first:end].float() if scale is None else g[first:end].float() * scale
            taken = (ok if axis == 0 else ok[first:end]) & usable(part) & (True if go is None else go)
            error[first:end].add_(torch.where(taken, part, 0))
        return error, ok

    def after(self, g, r, state):
        store_of(state).back_(state["error"], r, state, alpha=-1.0)


class SparseResidual(Remainder):
    """GaLore+: dropped, but for the entries where it was largest when the first basis was chosen: the moments there are exact.

    G_e has moments of its own, and the update there is Adam's of them in place of back(X). Group key: `scale`, of both. State of a
    matrix: `entries` int32 (k,), ascending, of the matrix in rows; `entry_avg`, `entry_avg_sq` fp32 (k,).

    Args:
        density: k / (m n), rounded up.
    """

    name, from_low_rank, basis, begins, reads = "sparse-residual", False, True, True, ("betas", "eps")
    unsharded = "its entries are the largest of the whole matrix"
    categories = dict.fromkeys(("entries", "entry_avg", "entry_avg_sq"), "moments")

    def __init__(self, density):
        if not 0 < density <= 1:
            raise ValueError(f"residual_density must be in (0, 1], got {density!r}")
        self.density = density

    def init(self, state, param):
        count, on = math.ceil(self.density * param.numel()), {"device": param.device}
        state["entries"] = torch.arange(count, dtype=torch.int32, **on)
        state["entry_avg"], state["entry_avg_sq"] = (torch.zeros(count, dtype=torch.float32, **on) for _ in range(2))

    def begin(self, g, state):
        basis, count = store_of(state).load(state, axis_of(g.shape, state)).float(), len(state["entries"])
        r = store_of(state).project(g, state)
        sizes, places = r.new_zeros(0), state["entries"].new_zeros(0, dtype=torch.int64)
        for first, end in panels(g.shape):
            back = basis[first:end] @ r if state["left"] else r[first:end] @ basis.T
            left_out = (g[first:end].float() - back).abs().flatten()
            here = torch.arange(left_out.numel(), device=g.device) + first * g.shape[1]
            sizes, places = torch.cat([sizes, torch.where(left_out.isfinite(), left_out, 0)]), torch.cat([places, here])
            sizes, largest = sizes.topk(min(count, len(sizes)))
            places = places[largest]
        state["entries"].copy_(places.sort().values)
        state["entry_avg"].zero_()
        state["entry_avg_sq"].zero_()

    def of(self, g, r, x, s, state, h):
        places, (beta1, beta2) = state["entries"].long(), h["betas"]
        ok = s.ok.flatten()[places % g.shape[1] if state["left"] else places // g.shape[1]]
        value = g.flatten()[places].float() if s.grad_scale is None else g.flatten()[places].float() * s.grad_scale
        for key, new, beta in (("entry_avg", value, beta1), ("entry_avg_sq", value.square(), beta2)):
            state[key].copy_(torch.where(ok, beta * state[key] + (1 - beta) * new, state[key]))
        first, second = (correction.to(r.dtype) for correction in corrections(s, h))
        exact = (state["entry_avg"] / first) / ((state["entry_avg_sq"] / second).sqrt() + h["eps"])
        return Update(x=x * h["scale"], at=(places, exact * h["scale"]))
