"""Class paths for stacks that hand over parameters alone, without a model or names, as torchtitan and NeMo do.

    _target_: lowrank_sys.integrations.flat.galore        # NeMo, and whoever instantiates by a path
    lowrank_sys.integrations.flat.q_galore(model.parameters(), lr=1e-4, rank=128)

There is one for every method that `lowrank train --method` knows and that needs no model, with _ for -. Matrices are chosen by
shape (`param_groups`).
"""

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from lowrank_sys.integrations.building import build, method_of
from lowrank_sys.nn.coefficient import is_coefficient
from lowrank_sys.optim import LowRankOptimizer
from lowrank_sys.optim.groups import known_keys
from lowrank_sys.optim.groups import param_groups as of_a_model
from lowrank_sys.optim.preset import METHODS
from lowrank_sys.subspace.matrices import matrix_shape

# Layers repeat, and give each of their shapes as often; embeddings and heads of a vocabulary are two at most.
REPEATED = 3


def param_groups(
    params: Iterable[Any], rank: int | None = 128, *, vocab_size: int | None = None, plain: dict[str, Any] | None = None,
    stochastic_rounding: bool = False, **low_rank: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Optimizer groups of parameters that nothing but their shapes is known of.

    A parameter of two dimensions, or of three (experts), trains in a subspace where its shape occurs at least REPEATED times among
    all of `params`, as those of layers do; embeddings and heads do not, and are plain. With `vocab_size`, of rows as the model
    has them, it does wherever no side is that long: for models of two layers and less. Shapes with a side below the rank are plain,
    and so is everything else.

    params: parameters or named ones, or groups of them, each of which keeps its keys. plain, low_rank: keys of what is plain, and
    of what has a subspace. Raises ValueError where there is no matrix to choose.
    """
    known = known_keys()
    if unknown := sorted(low_rank.keys() - known):
        raise ValueError(f"keys of the low-rank group must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    groups = list(params)
    if not (groups and isinstance(groups[0], dict)):
        groups = [{"params": groups}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    every = [_bare(param) for group in groups for param in group["params"]]
    if any(is_coefficient(p) for p in every):
        raise ValueError("params must be without projected layers, which have sides of their own; use optim.param_groups(model)")
    times = Counter(p.shape for p in every)

    def is_matrix(param) -> bool:
        p = _bare(param)
        if p.dim() not in (2, 3) or min(matrix_shape(p.shape)) < (rank or 1):
            return False
        return times[p.shape] >= REPEATED if vocab_size is None else vocab_size not in p.shape

    rounding = {"stochastic_rounding": True} if stochastic_rounding else {}
    made = []
    for group in groups:
        sorts = {True: [], False: []}
        for param in group["params"]:
            sorts[is_matrix(param)].append(param)
        made += [
            {**keys, **group, **rounding, "params": found}
            for keys, found in ((plain or {}, sorts[False]), ({"rank": rank, **low_rank}, sorts[True]))
            if found
        ]
    if not any("rank" in group for group in made):
        kind = f"whose shape occurs {REPEATED} times or more" if vocab_size is None else f"without a side of {vocab_size=}"
        raise ValueError(f"params must hold a matrix of at least rank {rank} {kind}, got {len(every)} parameters without one")
    return made


def _bare(param: Any) -> torch.Tensor:
    return param[1] if isinstance(param, tuple) else param


def _optimizer(
    name: str, params: Iterable[Any], *, fused: bool | None = None, foreach: bool | None = None, **keywords: Any
) -> LowRankOptimizer:
    """The optimizer of method `name` over parameters by their shapes.

    keywords: `lr` and `plain_lr`, `rank`, `vocab_size` and group keys, arguments of the method's class. fused, foreach: torch's
    ways of running a step, which torchtitan hands over; a step here has one way, whatever they are.
    """
    return build(method_of(name), functools.partial(param_groups, params), **keywords)


def __getattr__(name: str) -> Any:
    method = name.replace("_", "-")
    if method not in METHODS or METHODS[method].groups is not of_a_model:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(_optimizer, method)
