"""The ledger: bytes that an optimizer and its weights hold, by category.

Every part of an optimizer declares what its state keys are: a class attribute `categories`, a dict from key to category; the
moments of a rule are "moments". A key that no part declares is "other", so nothing is left out. What the mode of the gradients
holds beside the state it yields from `held(optimizer)`, as (category, tensor).
"""

import torch

from lowrank_sys.nn.quant_weight import is_quantized, part_tensors, rows_here
from lowrank_sys.optim.storages import storages

# The usual categories, in the order they are shown; parts may bring their own.
CATEGORIES = ("weights", "gradients", "basis", "moments", "scales", "accumulators", "counters", "other")


def entries(optimizer):
    """Yield (category, tensor, in_state) of everything that `optimizer` (a LowRankOptimizer) holds or trains."""
    kinds = {"step": "counters", **optimizer.pipeline.categories()}
    yield from ((category, tensor, False) for category, tensor in optimizer.gradients.held(optimizer))
    for group in optimizer.param_groups:
        for param in group["params"]:
            if is_quantized(param):
                yield "scales", rows_here(param).scale, False
                yield "weights", rows_here(param).codes, False
                yield from (("weights", tensor, False) for tensor in part_tensors(param))
            yield "weights", param, False
            if param.grad is not None:
                yield "gradients", param.grad, False
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                yield kinds.get(key, "other"), value, True
    for counter in optimizer.counters.values():
        yield "counters", counter, False


def _sums(entries):
    """Bytes by category; storages that several tensors share count once, for the first."""
    seen, sums = set(), {}
    for category, tensor, _ in entries:
        for storage in storages(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                sums[category] = sums.get(category, 0) + storage.nbytes()
    return sums


def memory(optimizer):
    """Bytes of distinct storages by category, and their `total`; the usual categories are there even if 0."""
    sums = {**dict.fromkeys(CATEGORIES, 0), **_sums(entries(optimizer))}
    return {**sums, "total": sum(sums.values())}


def state_bytes(optimizer):
    """Bytes of the state: what a checkpoint of the optimizer holds."""
    return sum(_sums(entry for entry in entries(optimizer) if entry[2]).values())
