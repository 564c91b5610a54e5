"""WeLore's ranks (Jaiswal et al. 2024, arXiv:2407.11239): where the spectrum of a weight falls fast, it needs few directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowrank_sys.nn.linear_layers import experts, linear_layers


@dataclass(frozen=True, eq=False)
class WeLoreRanks:
    """A rank for each matrix of a model: what `rank` of param_groups, of project_model and of a group takes.

    ranks: {name of a weight: its rank}. threshold: what every score that counts is at least. low_rank: names of the weights with a
    heavy tail, at less than `split` of their full rank: of a square one r (m + n) numbers are then fewer than m n. other: the rest.
    """

    ranks: Mapping[str, int]
    threshold: float
    low_rank: tuple[str, ...]
    other: tuple[str, ...]

    def __call__(self, name: str, weight: torch.Tensor) -> int:
        if name not in self.ranks:
            raise ValueError(
                f"rank must be known of {name}, these are of {len(self.ranks)} weights by their names in the model, as the groups "
                "of param_groups have them"
            )
        return self.ranks[name]


@torch.no_grad()
def welore_ranks(
    model: nn.Module, *, ratio: float | None = None, budget: int | None = None, by: Literal["values", "energy"] = "values",
    split: float = 0.5, target_modules: Sequence[str] | Callable[[str], bool] | None = None,
) -> WeLoreRanks:  # fmt: skip
    """Ranks of the weights that param_groups(model) trains in a subspace, from their singular values alone, without data.

    One threshold for all: the rank of a weight is how many of its scores reach it, and the ranks add up to what is asked for.

    Args:
        model: whose trainable linear layers are looked at, float or INT8; each costs a singular value decomposition. A stack of
            experts counts as one matrix, with the mean of its scores.
        ratio: all ranks together as a share of all full ranks, in (0, 1]; or
        budget: the sum of all ranks, such as 128 times the number of matrices.
        by: the score of a singular value, in descending order: 'values', over the largest of its weight, as in the paper; or
            'energy', the share of the sum of squares that it and the smaller ones have.
        split: below this share of its full rank a weight is of low rank.
        target_modules: as of param_groups.
    """
    if (ratio is None) == (budget is None):
        raise ValueError(f"either ratio or budget must be given, got ratio={ratio!r} and budget={budget!r}")
    if by not in ("values", "energy"):
        raise ValueError(f"by must be 'values' or 'energy', got {by!r}")
    inside = {id(layer.weight) for _, layer in linear_layers(model, target_modules)}
    inside |= {id(p) for _, p in experts(model, target_modules)}
    found = {name: p for name, p in model.named_parameters() if id(p) in inside and p.requires_grad and 0 not in p.shape}
    if not found:
        raise ValueError(f"model must have a trainable linear layer, got {type(model).__name__}")
    scores = {name: _scores(name, weight, by) for name, weight in found.items()}
    full = {name: len(score) for name, score in scores.items()}
    count, most = len(scores), sum(full.values())
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
        budget = max(count, round(ratio * most))
    if not count <= budget <= most:
        raise ValueError(f"budget must be from {count}, the number of weights, to {most}, their full ranks, got {budget!r}")
    owners = torch.arange(count).repeat_interleave(torch.tensor(list(full.values())))
    every = torch.cat(list(scores.values()))
    kept = every.sort(descending=True, stable=True).indices[:budget]
    ranks = dict(zip(scores, owners[kept].bincount(minlength=count).tolist()))
    low = tuple(name for name, rank in ranks.items() if rank < split * full[name])
    return WeLoreRanks(ranks, float(every[kept[-1]]), low, tuple(name for name in ranks if name not in low))


def _scores(name, weight, by):
    """(k,) fp32 on the CPU, descending; the first is 1."""
    if weight.is_meta:
        raise ValueError(f"{name} must have values, got a weight on the meta device")
    values = torch.linalg.svdvals(weight.detach().float().flatten(2 if weight.dim() == 3 else 1)).cpu()
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite")
    if by == "energy":
        values = values.square().flip(-1).cumsum(-1).flip(-1)
    scores = torch.nan_to_num(values / values[..., :1])
    scores[..., 0] = 1
    return scores.mean(0) if scores.dim() == 2 else scores
