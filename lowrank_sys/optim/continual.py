"""GORP (Wang et al. 2025, arXiv:2507.02503): a basis of what past tasks have learnt, which updates avoid."""

import torch

from lowrank_sys.distributed import World
from lowrank_sys.nn.quant_weight import is_quantized, rows_here
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.names import name_of
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.shards import is_dtensor

# Where the optimizers of torch keep a first moment.
MOMENTS = ("exp_avg", "momentum_buffer")


class PastTasks:
    """Keeps what `optimizer` does to a matrix W (m, n) off U (n, k), the directions of its inputs that past tasks have used.

        tasks = PastTasks(optimizer)
        for task in stream:
            train(model, optimizer, task)
            tasks.finish_task()

    A task that ends adds to U the leading right singular vectors of the first moment, as many as it takes to hold `threshold` of
    its squares together with what U holds already. From then on gradients go through G <- G - G U Uᵀ before a step, so that moments
    and bases are of what is free, and after it W U is brought back to what it was when the task ended: the update, decay
    included, is projected off U whatever the rule makes of a gradient.

    Args:
        optimizer: one of lowrank_sys.optim or of torch, that keeps a first moment, with dense gradients until the step.
        threshold: share of the squares of a first moment, in (0, 1].
        params: the matrices that are kept so; those in groups with a `rank` by default, or where there are none, all.
        side: 'right', as above; 'left': U (m, k) are directions of outputs, and G <- G - U Uᵀ G.

    Raises ValueError for what it cannot serve: quantized and sharded weights, per_layer, rules without a first moment.
    """

    def __init__(self, optimizer, *, threshold=0.95, params=None, side="right"):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold!r}")
        if side not in ("left", "right"):
            raise ValueError(f"side must be one of left, right, got {side!r}")
        self.optimizer, self.threshold, self.side, self.tasks = optimizer, threshold, side, 0
        self._names = _matrices(optimizer, params)
        self._bases, self._kept = {}, {}  # parameter -> U, and W U (left: Wᵀ U), fp32
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def remove(self):
        """Let the optimizer go: updates are its own again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def finish_task(self):
        """Add what the task has used to the bases. Returns {name: k}, the directions that are taken of each matrix."""
        found = {param: _first_moment(self.optimizer, param, name, self.side) for param, name in self._names.items()}
        for param, moment in found.items():
            if moment is not None:
                self._extend(param, moment)
        self.tasks += 1
        return {name: self._bases[param].shape[1] if param in self._bases else 0 for param, name in self._names.items()}

    def _extend(self, param, moment):
        """moment (., n): a matrix with the singular values and the right singular vectors of the first moment."""
        moment, old = moment.double(), self._bases.get(param)
        old = moment.new_zeros(moment.shape[1], 0) if old is None else old.double()
        rest = moment - (moment @ old) @ old.T
        _, values, vh = torch.linalg.svd(rest, full_matrices=False)
        squares, total = values.square(), moment.square().sum()
        held = total - rest.square().sum() + torch.cat([squares.new_zeros(1), squares.cumsum(0)])
        count = min(int((held < self.threshold * total).sum()), len(values), len(old) - old.shape[1])
        new = vh[:count].T
        new = torch.linalg.qr(new - old @ (old.T @ new)).Q.float()
        if World().size > 1:
            World().from_first_([new])
        basis = torch.cat([old.float(), new], 1).contiguous()
        kept = self._turned(param).float() @ new
        self._bases[param] = basis
        self._kept[param] = torch.cat([self._kept[param], kept], 1) if param in self._kept else kept

    def _turned(self, matrix):
        """The matrix with the side of U on its right."""
        return matrix.detach() if self.side == "right" else matrix.detach().T

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs):
        for param, basis in self._bases.items():
            if param.grad is not None:
                grad = self._turned(param.grad)
                grad.sub_((grad.float() @ basis @ basis.T).to(grad.dtype))

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs):
        for param, basis in self._bases.items():
            if param.grad is not None:
                weight = self._turned(param)
                weight.sub_(((weight.float() @ basis - self._kept[param]) @ basis.T).to(weight.dtype))

    def state_dict(self):
        """{"tasks", "side", "bases": {name: U}, "kept": {name: W U}}: plain numbers and tensors alone."""
        bases, kept = ({self._names[param]: value.clone() for param, value in held.items()} for held in (self._bases, self._kept))
        return {"tasks": self.tasks, "side": self.side, "bases": bases, "kept": kept}

    def load_state_dict(self, state_dict):
        """Take up a state; ValueError for one of other matrices."""
        if state_dict["side"] != self.side:
            raise ValueError(f"side of the loaded state must be {self.side}, as of this object's, got {state_dict['side']}")
        params = {name: param for param, name in self._names.items()}
        loaded = {"bases": {}, "kept": {}}
        for name, basis in state_dict["bases"].items():
            if name not in params:
                raise ValueError(f"the loaded state must be of {', '.join(params)}, got {name}")
            rows, size = self._turned(params[name]).shape
            kept, k = state_dict["kept"][name], basis.shape[-1]
            if tuple(basis.shape) != (size, k) or tuple(kept.shape) != (rows, k):
                raise ValueError(
                    f"the loaded basis of {name} must have shape ({size}, k), and what it keeps ({rows}, k), got "
                    f"{tuple(basis.shape)} and {tuple(kept.shape)}"
                )
            for key, value in (("bases", basis), ("kept", kept)):
                loaded[key][params[name]] = value.to(params[name].device, torch.float32, copy=True)
        self.tasks, self._bases, self._kept = int(state_dict["tasks"]), loaded["bases"], loaded["kept"]


def _matrices(optimizer, params):
    """{parameter: its name} of what is kept; ValueError for what cannot be."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be one of torch or of lowrank_sys.optim, got {type(optimizer).__name__}")
    groups = optimizer.param_groups
    named = {p: (name_of(group, g, i), group) for g, group in enumerate(groups) for i, p in enumerate(weights(group))}
    if params is None:
        ranked = any("rank" in group for group in groups)
        params = [p for p, (_, group) in named.items() if ("rank" in group if ranked else p.dim() == 2)]
    params = list(params)
    if not params:
        raise ValueError(f"params must have a matrix, got none of {type(optimizer).__name__}")
    if foreign := [p for p in params if p not in named]:
        raise ValueError(f"params must be of the optimizer, got one of shape {tuple(foreign[0].shape)} that is not")
    ours = isinstance(optimizer, LowRankOptimizer)
    if ours and optimizer.gradients.served_by_hooks:
        raise ValueError(f"per_layer must be None for PastTasks, got {optimizer.gradients.describe()}: it needs G before the step")
    for p in params:
        name, group = named[p]
        if p.dim() != 2 or is_quantized(p) or is_dtensor(p):
            coded = f"of {rows_here(p).coding.name.upper()}" if is_quantized(p) else None
            kind = "sharded" if is_dtensor(p) else coded or f"of shape {tuple(p.shape)}"
            raise ValueError(f"{name} must be a matrix of floats in one place for PastTasks, got one {kind}")
        kept = optimizer.keeps_first_moment(group) if ours else "betas" in group or group.get("momentum", 0) > 0
        if not kept:
            raise ValueError(f"optimizer must keep a first moment of {name} for PastTasks, {type(optimizer).__name__} keeps none")
    return {p: named[p][0] for p in params}


def _first_moment(optimizer, param, name, side):
    """A matrix (., n) with the right singular vectors and the singular values of the first moment (side left: (., m), of its
    transpose); None before a first step."""
    if not optimizer.state.get(param):
        return None
    if isinstance(optimizer, LowRankOptimizer):
        factors = optimizer.first_moment(param)
    else:
        factors = next(((optimizer.state[param][key],) for key in MOMENTS if optimizer.state[param].get(key) is not None), None)
        if factors is None:
            raise ValueError(f"the state of {name} must have {' or '.join(MOMENTS)}, got {', '.join(optimizer.state[param])}")
    factors = factors if side == "right" else [factor.T for factor in reversed(factors)]
    outer, *inner = [factor.float() for factor in factors]
    return torch.linalg.qr(outer).R @ inner[0] if inner else outer
