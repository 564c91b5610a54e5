"""The memory behind tensors."""

from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storages(tensor):
    """The storages behind `tensor`: one, or those of the tensors inside a wrapper subclass."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    return [storage for name in names for storage in storages(getattr(tensor, name))]
