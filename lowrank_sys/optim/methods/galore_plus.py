"""GaLore+ (Liao et al. 2024, arXiv:2412.19820): one basis for all heads of an attention, and exact moments where it errs most."""

import torch

from lowrank_sys.optim.groups import ParamGroups, param_groups
from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import SparseResidual
from lowrank_sys.optim.types import Params, Rate
from lowrank_sys.subspace.select import SELECT, Selector, randomized_basis


class CrossHead(Selector):
    """Randomized subspace iteration on the channels of one of `heads`, drawn each time; of neighbours too, below the rank."""

    hyper, counts = {"heads": 1}, True
    unsharded = "the rows of a head may lie on several processes"

    def choose(self, due):
        g, axis, heads = due.gradient, 1 if due.left else 0, int(due.h["heads"])
        width = -(-g.shape[axis] // heads)
        size = min(g.shape[axis], width * -(-due.rank // width))
        draw = torch.Generator().manual_seed(due.seed + (int(due.state["refreshes"]) << 32))
        first = min(width * int(torch.randint(heads, (), generator=draw)), g.shape[axis] - size)
        block = g.narrow(axis, first, size).contiguous()
        return randomized_basis(block, due.old, rank=due.rank, left=due.left, seed=due.seed)


SELECT["cross-head"] = CrossHead()


def groups(model, rank=128, **keys):
    """param_groups, with the attention's matrices in groups of their own: by the heads of their outputs (q, k, v) or inputs (o).

    The basis is on the other side, which all heads share.
    """
    split = param_groups(model, rank, **keys)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", 1)
    of_keys = getattr(getattr(model, "config", None), "num_key_value_heads", None) or heads
    kinds = {"q_proj": ("right", heads), "k_proj": ("right", of_keys), "v_proj": ("right", of_keys), "o_proj": ("left", heads)}
    made = split[:1]
    for group in split[1:]:
        sorts = {}
        for name, param in group["params"]:
            sorts.setdefault(next((kinds[part] for part in name.split(".") if part in kinds), None), []).append((name, param))
        for kind, params in sorts.items():
            own = {} if kind is None else {"proj_type": kind[0], "heads": kind[1]}
            made.append({**group, **own, "params": params})
    return ParamGroups(made, model, split.projected)


@method("galore-plus", lr=5e-3, plain_lr=3e-3, subspace="cross-head", groups=groups)
class GaLorePlus(Preset):
    """GaLoreAdamW on a basis from the gradient of one head, with Adam exact in the entries of which it leaves most.

    Group keys: those of GaLoreAdamW, and `heads` (1), into which the channels of a matrix (rows of a right basis, columns of a left
    one) fall; lowrank_sys.optim.methods.galore_plus.groups(model) sets them. `subspace="cross-head"` serves other methods too.

    Args:
        residual_density: share of the entries whose moments are exact, chosen with the first basis.
        others: as of every preset.

    State of a matrix: that of GaLoreAdamW, `refreshes`, and SparseResidual's: 12 bytes an entry.
    """

    low_rank_defaults = {"subspace": "cross-head"}

    def __init__(self, params: Params, lr: Rate = 1e-3, *args, residual_density: float = 0.01, **options) -> None:
        self.remainder = SparseResidual(residual_density)
        super().__init__(params, lr, *args, **options)
