"""The rules that every op's arguments obey, and how an op is declared. A broken rule is one error that names the argument."""

import contextlib
import functools

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)

# Parts of schemas: Adam's hyper-parameters, and what the list forms of a step take beside their tensors.
ADAM = "float beta1, float beta2, float eps, float weight_decay"
GUARDS = "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(z!)? skipped=None"

library = torch.library.Library("lowrank", "DEF")


def define(schemas):
    """Declare ops: name, with its overload after a dot -> schema."""
    for name, schema in schemas.items():
        torch.library.define(f"lowrank::{name}", schema, lib=library, tags=(torch.Tag.pt2_compliant_tag,))


def unswitched(function):
    """`function`, computing alike inside and outside of torch.autocast: a step's precision is its own."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


def implement(name, function, key):
    """Serve op `name` with a Python function on the dispatch key `key`."""
    library.impl(name, unswitched(function), key)


def fake(name):
    """Decorator: the function checks the arguments of op `name` and returns empty results."""
    return torch.library.register_fake(f"lowrank::{name}", lib=library)


def expect(condition, op, message):
    if condition is not True:  # true by plain numbers: the usual case, and the only one that torch need not look at
        torch._check(condition, lambda: f"{op}: {message()}")


def expect_float(op, name, tensor):
    expect(tensor.dtype in FLOATS, op, lambda: f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def expect_dtype(op, name, tensor, dtype):
    expect(tensor.dtype == dtype, op, lambda: f"{name} must be {dtype}, got {tensor.dtype}")


def expect_like(op, name, tensor, shape, device):
    """`tensor` has `shape`, lies on `device` and is contiguous."""
    expect(tensor.dim() == len(shape), op, lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for got, want in zip(tensor.shape, shape):
        expect(got == want, op, lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    expect(tensor.device == device, op, lambda: f"{name} must be on {device}, got {tensor.device}")
    expect(tensor.is_contiguous(), op, lambda: f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def expect_matrix(op, name, tensor):
    expect(tensor.dim() == 2, op, lambda: f"{name} must be a matrix (m, n), got shape {tuple(tensor.shape)}")
    expect_float(op, name, tensor)
    expect(tensor.is_contiguous(), op, lambda: f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def expect_scalar(op, name, tensor, device, own_device=False):
    """`tensor` is 0-dim; on `device`, or on the CPU as well unless it is written."""
    expect(tensor.dim() == 0, op, lambda: f"{name} must be a 0-dim tensor, got shape {tuple(tensor.shape)}")
    fits = tensor.device == device or (tensor.device.type == "cpu" and not own_device)
    expect(fits, op, lambda: f"{name} must be on {device}, got {tensor.device}")


def expect_basis(op, matrix, basis, left):
    """`basis` (d, r) fits `matrix`: d its projected axis, r >= 1. A shard may have fewer than r rows, or none."""
    d = matrix.shape[0 if left else 1]
    axis = "m" if left else "n"
    expect(
        basis.dim() == 2 and basis.shape[0] == d,
        op,
        lambda: f"basis must have shape ({axis} = {d}, r) for left={left}, got {tuple(basis.shape)}",
    )
    expect(basis.shape[1] >= 1, op, lambda: f"rank must be at least 1, got basis of shape {tuple(basis.shape)}")
    expect_float(op, "basis", basis)
    expect(basis.device == matrix.device, op, lambda: f"basis must be on {matrix.device}, got {basis.device}")
    expect(basis.is_contiguous(), op, lambda: f"basis must be contiguous, got strides {tuple(basis.stride())}")


def low_rank_shape(matrix, basis, left):
    """Shape of R = project(matrix, basis)."""
    return (basis.shape[1], matrix.shape[1]) if left else (matrix.shape[0], basis.shape[1])


def expect_number(op, name, tensor, device):
    expect_scalar(op, name, tensor, device)
    expect(tensor.dtype in NUMBERS, op, lambda: f"{name} must be float32, float64, int32 or int64, got {tensor.dtype}")


def expect_group_size(op, group_size):
    expect(
        32 <= group_size <= 1024 and group_size & (group_size - 1) == 0,
        op,
        lambda: f"group_size must be a power of two from 32 to 1024, got {group_size}",
    )


def check_lists(op, **lists):
    """All lists have one length."""
    (first, tensors), *rest = lists.items()
    for name, other in rest:
        expect(len(other) == len(tensors), op, lambda: f"{name} must have {len(tensors)} tensors like {first}, got {len(other)}")


def check_guards(op, params, steps, lr, grad_scale, found_inf, skipped, first="params", counted=True):
    """`skipped` is an int64 counter; the guards and the counters are 0-dim tensors of the parameters' device.

    `first` is the name of the list `params`; lr is None, and params are not empty, where the op has no rate. Unless the steps are
    `counted` they are numbers, which the op only reads.
    """
    device = params[0].device if params else lr.device
    if lr is not None:
        expect_number(op, "lr", lr, device)
    for i, step in enumerate(steps):
        if counted:
            expect_scalar(op, f"steps[{i}]", step, params[i].device, own_device=True)
            expect_dtype(op, f"steps[{i}]", step, torch.float32)
        else:
            expect_number(op, "step" if len(steps) == 1 else f"steps[{i}]", step, params[i].device)
    for i, param in enumerate(params):
        expect(param.device == device, op, lambda: f"{first}[{i}] must be on {device} like {first}[0], got {param.device}")
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            expect(tensor.numel() == 1, op, lambda: f"{name} must have one element, got shape {tuple(tensor.shape)}")
            expect_dtype(op, name, tensor, torch.float32)
            expect(tensor.device == device, op, lambda: f"{name} must be on {device}, got {tensor.device}")
    if skipped is not None:
        expect_scalar(op, "skipped", skipped, device, own_device=True)
        expect_dtype(op, "skipped", skipped, torch.int64)
