"""param_groups: which weights of a model train in a subspace."""

from lowrank_sys.nn.linear_layers import linear_layers
from lowrank_sys.optim.coefficient import is_coefficient
from lowrank_sys.optim.residual import Dropped, ScaledGradient, ScaledResidual, StateFree
from lowrank_sys.subspace.keyed import Keyed
from lowrank_sys.subspace.rows import Rows

# Whose keys a low-rank group may have; its optimizer says which of them it reads.
PARTS = (Keyed, Rows, Dropped, ScaledGradient, ScaledResidual, StateFree)


class ParamGroups(list):
    """Parameter groups that know their model, which per_layer='accumulate' asks for."""

    def __init__(self, groups, model):
        super().__init__(groups)
        self.model = model


def param_groups(model, rank=128, *, target_modules=None, plain=None, **low_rank):
    """Two optimizer groups: weights of linear layers in a subspace, everything else plain.

    Embeddings, norms, biases, output heads and weights tied to an embedding are plain. The INT8 weight of a QuantLinear is one
    of a linear layer.

    Args:
        model: nn.Module. Frozen parameters are left out.
        rank: of the low-rank group; at most min(m, n) of every weight in it.
        target_modules: substrings of module names; a linear layer is low-rank if its name contains one. All by default.
        plain: keys of the plain group, e.g. {"lr": 1e-3}.
        **low_rank: keys of the low-rank group, e.g. update_proj_gap, scale, proj_type, subspace, moments, seed, lr.

    Returns:
        [plain group, low-rank group] with named parameters: a list, with the model as its `model`.
    """
    known = {*(key for part in PARTS for key in part.defaults), "lr", "weight_decay", "betas", "eps", "min_8bit_size"}
    if unknown := sorted(low_rank.keys() - known):
        raise ValueError(f"keys of the low-rank group must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    chosen = {id(module.weight) for _, module in linear_layers(model, target_modules)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not is_coefficient(p)]
    matrices = [(name, p) for name, p in named if id(p) in chosen]
    if not matrices:
        wanted = "" if target_modules is None else f" whose name contains one of {', '.join(target_modules)}"
        raise ValueError(f"model has no trainable linear layer{wanted}")
    others = [(name, p) for name, p in named if id(p) not in chosen]
    return ParamGroups([{"params": others, **(plain or {})}, {"params": matrices, "rank": rank, **low_rank}], model)
