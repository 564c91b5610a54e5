"""Parameters of more than two dimensions as the matrices that they are: experts one by one, convolutions flat.

A parameter (E, m, n) is E matrices, each with a basis, moments, a schedule and a step counter of its own; its state's tensors have
the leading dimension E. A convolution (out, in, kh, kw) is one matrix (out, in kh kw).
"""

import torch


def is_batch(shape):
    """Whether a weight of this shape is several matrices."""
    return len(shape) == 3


def count(shape):
    """How many matrices a weight of this shape is."""
    return shape[0] if is_batch(shape) else 1


def matrix_shape(shape):
    """(m, n) of one of them."""
    return tuple(shape[1:]) if is_batch(shape) else (shape[0], shape[1:].numel()) if len(shape) > 3 else tuple(shape)


def matrices(tensor):
    """Views (m, n) of a weight or of its gradient."""
    if tensor.dim() == 2:
        return [tensor]
    tensor = tensor.detach()
    if tensor.dim() == 3:
        return list(tensor.unbind())
    try:
        return [tensor.view(matrix_shape(tensor.shape))]
    except RuntimeError:
        strides = tuple(tensor.stride())
        raise ValueError(f"a convolution in a group with a rank must be contiguous, got strides {strides}") from None


def stacked(states):
    """The state of a batch from those of its matrices: tensors with a leading dimension, differing integers as lists."""
    first, one = states[0], {}
    for key, value in first.items():
        values = [state[key] for state in states]
        if isinstance(value, torch.Tensor):
            one[key] = torch.stack(values).pin_memory() if value.is_pinned() else torch.stack(values)
        else:
            one[key] = value if values.count(value) == len(values) else values
    return one


def parts(state, size):
    """The states of the `size` matrices of a batch: views, so that what is written is in `state`."""
    rows = {key: value for key, value in state.items() if isinstance(value, list)}
    rows |= {key: value.unbind() for key, value in state.items() if isinstance(value, torch.Tensor)}
    for e in range(size):
        yield {key: rows[key][e] if key in rows else value for key, value in state.items()}


def each(param, gradient, state):
    """(matrix, its gradient, its state) of all matrices of a weight; gradient None for none."""
    gradients = [None] * count(param.shape) if gradient is None else matrices(gradient)
    states = parts(state, count(param.shape)) if is_batch(param.shape) else [state]
    return list(zip(matrices(param), gradients, states))


def expect_matrices(name, param):
    """ValueError for a parameter that is none of these."""
    if param.dim() < 2:
        raise ValueError(f"{name} must have two or more dimensions to be in a group with a rank, got shape {tuple(param.shape)}")
