"""Modules whose code reads the weight of a layer inside them instead of calling the layer."""

import functools
import inspect
import re

from torch import nn

# `self.name.weight`, but not its type, place or shape, and not as a target.
READ = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b|\s*=[^=])")
# Methods that run before there is anything to compute.
MAKERS = re.compile(r"_*(init|reset|tie)")


def read_by_others(model):
    """The modules of `model` whose weight the code of the module around them reads, as Mamba's does in its kernels.

    By the source of its methods, which says so also of branches that only some device takes. Code without source reads nothing.
    """
    found = set()
    for parent in model.modules():
        children = parent._modules
        found.update(children[name] for name in _reads(type(parent)) if children.get(name) is not None)
    return found


@functools.cache
def _reads(kind):
    names = set()
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        for method in vars(owner).values():
            method = inspect.unwrap(getattr(method, "__func__", method))
            if inspect.isfunction(method) and not MAKERS.match(method.__name__):
                names.update(READ.findall(_source(method)))
    return frozenset(names)


def _source(method):
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""
