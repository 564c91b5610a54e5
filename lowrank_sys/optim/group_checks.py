"""What a group of parameters asks of the parts of its optimizer, and whether they can serve it."""

from lowrank_sys.optim.together import check_together
from lowrank_sys.optim.weight import weight_store


def check_stores(group, names):
    """Raise a ValueError that names a parameter that cannot be kept as it is in this group."""
    for name, param in zip(names, group["params"]):
        store = weight_store(param, group)
        if store.int8 and "rank" not in group:
            raise ValueError(f"{name} is a quantized weight, which trains in a group with a rank only")
        store.check(param, name)


def check_parts(optimizer, group, names):
    """Raise a ValueError that names a key of a low-rank group whose value the parts cannot serve."""
    pipeline, method = optimizer.pipeline, type(optimizer).__name__
    if group.get("quant") and "quant" not in pipeline.subspace.defaults:
        raise ValueError(f"quant must be False for {method}, got {group['quant']!r}")
    if "compensation" in group and "compensation" not in pipeline.subspace.defaults:
        raise ValueError(f"compensation must be left out for {method}, which merges nothing, got {group['compensation']!r}")
    if group.get("int8_gemm") and not ("int8_gemm" in pipeline.subspace.defaults and pipeline.serves_int8_gemm):
        raise ValueError(f"int8_gemm must be False for {method}, got {group['int8_gemm']!r}")
    pipeline.subspace.check(group, names)
    pipeline.remainder.check(group)
    check_together(pipeline, group)
