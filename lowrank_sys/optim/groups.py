"""param_groups: which weights of a model train in a subspace."""

from torch import nn

from lowrank_sys.optim.coefficient import is_coefficient
from lowrank_sys.subspace.subspace import Subspace

# Output heads by name, where the model does not say which module it is.
HEADS = ("lm_head", "head", "classifier", "score", "output")


class ParamGroups(list):
    """Parameter groups that know their model, which per_layer='accumulate' asks for."""

    def __init__(self, groups, model):
        super().__init__(groups)
        self.model = model


def _is_linear(module):
    # transformers' Conv1D (GPT-2) is a linear layer with a transposed weight.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def param_groups(model, rank=128, *, target_modules=None, plain=None, **low_rank):
    """Two optimizer groups: weights of linear layers in a subspace, everything else plain.

    Embeddings, norms, biases, output heads and weights tied to an embedding are plain.

    Args:
        model: nn.Module. Frozen parameters are left out.
        rank: of the low-rank group; at most min(m, n) of every weight in it.
        target_modules: substrings of module names; a linear layer is low-rank if its name contains one. All by default.
        plain: keys of the plain group, e.g. {"lr": 1e-3}.
        **low_rank: keys of the low-rank group, e.g. update_proj_gap, scale, proj_type, subspace, moments, seed, lr.

    Returns:
        [plain group, low-rank group] with named parameters: a list, with the model as its `model`.
    """
    known = {*Subspace.defaults, "scale", "lr", "weight_decay", "betas", "eps", "min_8bit_size"}
    if unknown := sorted(low_rank.keys() - known):
        raise ValueError(f"keys of the low-rank group must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = set()
    for name, module in model.named_modules():
        if not _is_linear(module) or module is head or id(module.weight) in embedded:
            continue
        if name.rpartition(".")[2] in HEADS:
            continue
        if target_modules is None or any(target in name for target in target_modules):
            chosen.add(id(module.weight))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not is_coefficient(p)]
    matrices = [(name, p) for name, p in named if id(p) in chosen]
    if not matrices:
        wanted = "" if target_modules is None else f" whose name contains one of {', '.join(target_modules)}"
        raise ValueError(f"model has no trainable linear layer{wanted}")
    others = [(name, p) for name, p in named if id(p) not in chosen]
    return ParamGroups([{"params": others, **(plain or {})}, {"params": matrices, "rank": rank, **low_rank}], model)
