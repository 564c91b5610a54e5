"""The memory behind tensors."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(tensor):
    """The storages behind `tensor`: one, or those of the tensors inside a wrapper subclass."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    inside = [getattr(tensor, name) for name in names]  # of a DTensor its mesh, too
    return [storage for part in inside if isinstance(part, torch.Tensor) for storage in storages(part)]
