"""Which linear layers of a model are its matrices: one rule for what trains in a subspace and for what is kept in INT8."""

from torch import nn

from lowrank_sys.nn.projected_linear import ProjectedLinear
from lowrank_sys.nn.quant_weight import is_quantized

# Output heads by name, where the model does not say which module it is.
HEADS = ("lm_head", "head", "classifier", "score", "output")


def _is_linear(module):
    if isinstance(module, (nn.Linear, ProjectedLinear)) or is_quantized(getattr(module, "weight", None)):
        return True
    return type(module).__name__ == "Conv1D"  # of transformers (GPT-2): a linear layer with a transposed weight


def chosen(target_modules):
    """A function that says whether target_modules choose a name. ValueError if they are neither a list nor a function."""
    if isinstance(target_modules, str):
        raise ValueError(f"target_modules must be a list of substrings of module names, got {target_modules!r}")
    if target_modules is None:
        return lambda name: True
    return target_modules if callable(target_modules) else lambda name: any(target in name for target in target_modules)


def experts(model, target_modules=None):
    """[(name, parameter)] of weights (experts, out, in) or (experts, in, out): three dimensions, and "expert" in the name."""
    is_chosen = chosen(target_modules)
    return [(name, p) for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name.lower() and is_chosen(name)]


def linear_layers(model, target_modules=None):
    """[(name, module)] of the linear layers but for output heads and layers whose weight is tied to an embedding.

    target_modules: substrings of module names, of which a layer's must contain one, or a function that says whether a name is
    chosen. None: all.
    """
    is_chosen = chosen(target_modules)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside_head = set() if head is None else set(map(id, head.modules()))  # peft wraps a head that it trains whole
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if _is_linear(module)
        and id(module) not in inside_head
        and id(module.weight) not in embedded
        and name.rpartition(".")[2] not in HEADS
        and is_chosen(name)
    ]
