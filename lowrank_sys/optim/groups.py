"""param_groups: which weights of a model train in a subspace."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lowrank_sys.nn.coefficient import is_coefficient
from lowrank_sys.nn.linear_layers import chosen, experts, linear_layers
from lowrank_sys.nn.projected_linear import ProjectedLinear
from lowrank_sys.nn.quant_weight import is_quantized
from lowrank_sys.optim import hyper
from lowrank_sys.optim.remainder import Remainder
from lowrank_sys.optim.rules import Rule
from lowrank_sys.subspace.matrices import matrix_shape
from lowrank_sys.subspace.rank import Rank, expect_rank, is_whole, rank_of
from lowrank_sys.subspace.refresh import KINDS
from lowrank_sys.subspace.select import SELECT

# Keys of a low-rank group that no part reads but the optimizer.
COMMON = {"lr", "weight_decay", "min_8bit_size"}


def known_keys():
    """The keys that a low-rank group may have, of all parts there are; its optimizer says which of them it reads."""
    kinds = {key for kind in KINDS.values() for key in kind.defaults}
    return COMMON | Rule.keys | Remainder.keys | kinds | {key for selector in SELECT.values() for key in selector.hyper}


class ParamGroups(list):
    """Parameter groups that know their model, which per_layer='accumulate' asks for.

    projected: whether some of its layers are of project_model.
    """

    def __init__(self, groups, model, projected=False):
        super().__init__(groups)
        self.model, self.projected = model, projected

    @property
    def share(self):
        """The share of the trained elements that is in groups with a rank, from 0 to 1."""
        low = sum(p.numel() for group in self if "rank" in group for _, p in group["params"])
        return low / max(1, sum(p.numel() for group in self for _, p in group["params"]))


def param_groups(
    model: nn.Module, rank: Rank | None = 128, *, target_modules: Sequence[str] | Callable[[str], bool] | None = None,
    plain: Mapping[str, Any] | None = None, narrow: Literal["plain", "own"] = "plain", stochastic_rounding: bool = False,
    **low_rank: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Two optimizer groups: weights of linear layers in a subspace, everything else plain.

    Embeddings, norms, biases, output heads and weights tied to an embedding are plain. The quantized weight of a QuantLinear is one
    of a linear layer. Experts of three dimensions, as transformers keeps them, are matrices one by one. Layers of project_model
    keep their rank and side, in groups of their own.

    Args:
        model: nn.Module. Frozen parameters are left out.
        rank: of the low-rank group: a number, a share of the shorter side of each matrix (between 0 and 1), or a function
            (name, weight) -> number, such as welore_ranks makes; None for a method without a subspace.
        target_modules: substrings of module names; a linear layer is low-rank if its name contains one. Or a function of a name
            that says so. All by default.
        plain: keys of the plain group, e.g. {"lr": 1e-3}.
        narrow: what becomes of a matrix with a side below a rank that is a number, of which a warning tells: 'plain', it joins the
            plain group; or 'own', it trains at the rank that it has, in a group of all such, as a quantized weight always does.
        stochastic_rounding: of all groups: weights in 16 bits are rounded stochastically, with the random bits of `seed`.
        **low_rank: keys of the low-rank group, e.g. update_proj_gap, scale, proj_type, subspace, moments, seed, lr.

    Returns:
        [plain group, low-rank group, and one for each smaller rank] with named parameters: a list, with the model as its `model`
        and the share of the elements that is low-rank as its `share`.
    """
    known = known_keys()
    if unknown := sorted(low_rank.keys() - known):
        raise ValueError(f"keys of the low-rank group must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    rounding = {"stochastic_rounding": stochastic_rounding} if stochastic_rounding is not False else {}
    rank = None if rank is None else expect_rank(rank)
    keys = {"rank": rank, **low_rank, **rounding}
    hyper.check(keys, hyper.RULES)
    if narrow not in ("plain", "own"):
        raise ValueError(f"narrow must be 'plain' or 'own', got {narrow!r}")
    layers = _projected(model, rank, target_modules, low_rank)
    inside = {id(module.weight) for _, module in linear_layers(model, target_modules)}
    inside |= {id(p) for _, p in experts(model, target_modules)}
    named = [(name, p) for name, p in model.named_parameters() if (p.requires_grad or id(p) in layers) and not is_coefficient(p)]
    matrices = [(name, p) for name, p in named if id(p) in inside]
    if not matrices:
        wanted = " that target_modules choose" if callable(target_modules) else ""
        if isinstance(target_modules, Sequence):
            wanted = f" whose name contains one of {', '.join(target_modules)}"
        raise ValueError(f"model has no trainable linear layer{wanted}")
    numbered = is_whole(rank)
    least, usual = (rank, rank) if numbered else (1, "asked")
    rules = {"asked": rank, "layer's": lambda name, weight: layers[id(weight)][0]}
    by_rank = {(usual, None): []}
    for name, p in matrices:
        full = min(matrix_shape(p.shape))
        if id(p) in layers:
            own, side = layers[id(p)]
            by_rank.setdefault((own if numbered else "layer's", side), []).append((name, p))
        elif rank is None or full >= least:
            by_rank[usual, None].append((name, p))
        elif full > 0 and (narrow == "own" or is_quantized(p)):
            by_rank.setdefault((full, None), []).append((name, p))
    low = [
        {"params": params, **keys, "rank": rules.get(r, r), **({"proj_type": side} if side else {})}
        for (r, side), params in by_rank.items()
        if params or not layers
    ]
    if not any(group["params"] for group in low):
        name, p = matrices[0]
        most = min(matrix_shape(p.shape))
        raise ValueError(f"rank must be at most {most} for {name} of shape {tuple(p.shape)}, got {rank}: no matrix is as wide")
    inside = {id(p) for group in low for _, p in group["params"]}
    narrow_ones = [name for name, p in matrices if numbered and min(matrix_shape(p.shape)) < rank]
    _tell_of_narrow(narrow_ones, rank, own=any(r != usual for r, _ in by_rank))
    others = [(name, p) for name, p in named if id(p) not in inside]
    if rounding and "seed" in keys:
        rounding["seed"] = keys["seed"]
    return ParamGroups([{"params": others, **rounding, **(plain or {})}, *low], model, bool(layers))


def _projected(model, rank, target_modules, keys):
    """{id of a weight: (rank, side)} of the layers of project_model that train."""
    found, is_chosen = {}, chosen(target_modules)
    for name, layer in linear_layers(model):
        if isinstance(layer, ProjectedLinear) and layer.coefficient.requires_grad:
            if not is_chosen(name):
                raise ValueError(f"target_modules must name every projected layer, got none for {name}")
            if isinstance(rank, float) and rank_of(rank, name, layer.weight) != layer.rank:
                raise ValueError(f"rank must be what project_model was given, which made it {layer.rank} of {name}, got {rank}")
            found[id(layer.weight)] = (layer.rank, "left" if layer.projection.left else "right")
    if found and "proj_type" in keys:
        raise ValueError(f"proj_type must be left out for a model of projected layers, got {keys['proj_type']!r}")
    ranks = sorted({own for own, _ in found.values()})
    if found and rank not in ranks and (rank is None or is_whole(rank)):
        raise ValueError(f"rank must be {ranks[-1]}, as project_model was given, got {rank}")
    return found


def _tell_of_narrow(names, rank, own):
    if names:
        how = "at the rank they have" if own else "in the plain group"
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(f"{len(names)} linear layers are narrower than rank {rank} and train {how}: {some}", stacklevel=3)
