"""FRUGAL (Zmushko et al. 2024, arXiv:2411.07837) by whole layers: AdamW in a few of them at a time, signSGD in the others."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import StateFree
from lowrank_sys.schedule.roles import TRAINED, WHOLE
from lowrank_sys.schedule.schedule import Sampled
from lowrank_sys.subspace.basis import ROWS
from lowrank_sys.subspace.none import NoSubspace


class Blocks(NoSubspace):
    """All of a gradient where a matrix trains whole, and else nothing: a basis without vectors, an R without rows.

    Groups with `rank` None. State of a matrix: `indices` int32 (0,), not in a whole one.
    """

    defaults, categories = {**NoSubspace.defaults, "refresh": "now"}, ROWS.categories
    empties, unsharded = True, "its layers are drawn"

    def has_basis(self, group):
        return True

    def init(self, state, param, group, index, count):
        state["left"] = True
        state["indices"] = torch.empty(0, dtype=torch.int32, device=param.device)
        return torch.Size((0, param.shape[1]))

    def advance(self, *arguments, **options):
        """There is nothing to renew."""

    def project(self, group, grad, state):
        return grad.new_zeros((0, grad.shape[1]), dtype=torch.float32)

    def measured(self, group, grad, state):
        return grad


# One layer at a time from the command line, whose smallest models have two or three.
@method("frugal-blocks", lr=5e-4, plain_lr=3e-3, rank=None, options={"active_layers": 1})
class FrugalBlocks(Preset):
    """W <- (1 - lr*wd) W - lr Adam(G) in `active_layers` (2) layers, drawn evenly every `period` (200) steps; moments begin anew.

    In the others W <- (1 - lr*wd) W - lr residual_scale sign(G), without a state. What is in no layer has AdamW, always.
    Group keys: `residual_scale` (1), `seed`. The authors also take blocks in order.

    Args:
        inactive_update_rule: 'sign_sgd' | 'sgd', of the layers that are not drawn.
        others: as of every preset.

    State of a matrix: `exp_avg`, `exp_avg_sq` in a drawn layer, else nothing.
    """

    subspace = Blocks()
    schedule = Sampled(WHOLE, TRAINED, steps=200, restarts=True)

    def __init__(self, params, lr=1e-3, *args, inactive_update_rule: str = "sign_sgd", **options) -> None:
        if inactive_update_rule not in ("sign_sgd", "sgd"):
            raise ValueError(f"inactive_update_rule must be one of sign_sgd, sgd, got {inactive_update_rule!r}")
        self.remainder = StateFree(sign=inactive_update_rule == "sign_sgd")
        super().__init__(params, lr, *args, **options)
