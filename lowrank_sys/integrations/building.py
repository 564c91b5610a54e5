"""An optimizer from a method's name and keywords, as the configurations of other packages have them."""

import ast
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank_sys.optim import LowRankOptimizer
from lowrank_sys.optim.groups import known_keys
from lowrank_sys.optim.preset import METHODS, Method

# Keywords that are the groups' beside the keys of known_keys().
_OF_GROUPS = {"rank", "target_modules", "narrow", "stochastic_rounding", "vocab_size"}
# Group keys that the classes take as arguments, for all groups.
_OF_CLASSES = {"betas", "eps", "weight_decay", "momentum"}


def method_of(name: str) -> Method:
    """The method of a name of `lowrank train --method`. Raises ValueError for one that is no method's."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def value(text: str) -> Any:
    """A value of text: a number, a tuple, True, False or None, else the text, a name."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parsed(text: str | None) -> dict[str, Any]:
    """The keywords of "rank=128, betas=(0.9, 0.95), proj_type=std". Raises ValueError for what is no list of NAME=VALUE."""
    call = f"dict({text or ''})"
    try:
        found = ast.parse(call, mode="eval").body
        if not (isinstance(found, ast.Call) and isinstance(found.func, ast.Name)) or found.args:
            raise SyntaxError
        if any(keyword.arg is None for keyword in found.keywords):
            raise SyntaxError
    except SyntaxError:
        raise ValueError(f"optim_args must be NAME=VALUE, NAME=VALUE, ..., got {text!r}") from None
    return {keyword.arg: value(ast.get_source_segment(call, keyword.value)) for keyword in found.keywords}


def build(
    method: Method, groups: Callable[..., list[dict[str, Any]]], *, lr: float | None = None, plain_lr: float | None = None,
    plain: dict[str, Any] | None = None, **keywords: Any,
) -> LowRankOptimizer:  # fmt: skip
    """The optimizer of `method` with its defaults, over what `groups` makes of the keywords of groups.

    lr: the method's by default. plain_lr: of what has no subspace, `lr` by default. plain: keys of its group. keywords: of the
    groups, and arguments of the method's class. Raises ValueError for one that neither has.
    """
    plain_lr = lr if plain_lr is None else plain_lr
    lr, plain_lr = method.lr if lr is None else lr, method.plain_lr if plain_lr is None else plain_lr
    own = known_keys() - _OF_CLASSES | _OF_GROUPS
    keys = {"rank": method.rank, **method.keys, **{key: value for key, value in keywords.items() if key in own}}
    if method.rank is not None:
        keys = {"update_proj_gap": method.update_proj_gap, "subspace": method.subspace, method.scale_key: method.scale, **keys}
    options = {**method.options, **{key: value for key, value in keywords.items() if key not in own}}
    try:
        return method.optimizer(groups(plain={"lr": plain_lr, **(plain or {})}, **keys), lr=lr, **options)
    except TypeError as error:
        raise ValueError(f"keywords of {method.optimizer.__name__}: {error}") from error


def optimizer(method: str) -> Callable[[], Callable[..., LowRankOptimizer]]:
    """A factory of `method` (a name of `lowrank train --method`) for Trainer(optimizer_cls_and_kwargs=(factory, keywords)).

    keywords: `lr` (the method's by default) and `plain_lr`, of what has no subspace (`lr` by default); `rank`, `target_modules`,
    `plain`, and whatever else lowrank_sys.optim.param_groups takes; arguments of the method's class, such as `betas`,
    `weight_decay`, `per_layer`. Trainer calls factory()(model, **keywords), axolotl factory()(model, training_arguments,
    **keywords). Raises ValueError for a name that is no method's.
    """
    found = method_of(method)

    def factory(model: nn.Module, args: Any = None, **keywords: Any) -> LowRankOptimizer:
        return build(found, functools.partial(found.groups, model), **keywords)

    return lambda: factory
