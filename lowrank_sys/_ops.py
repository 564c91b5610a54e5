"""Schemas and fakes of every `torch.ops.lowrank` op: the API, and the executable rules of its shapes and dtypes.

Symbols: W (m, n) is a weight as `nn.Linear` stores it, G its gradient, B the basis, R the low-rank gradient.

| side         | basis B | project            | back  |
|--------------|---------|--------------------|-------|
| `left=True`  | (m, r)  | R = Bᵀ G, (r, n)   | B X   |
| `left=False` | (n, r)  | R = G B, (m, r)    | X Bᵀ  |

A *channel* is an index of the axis that is not projected: a column of G if left, a row if right. A channel of R that holds
a value that is not finite, or whose square overflows fp32, is skipped: its moments and its weights stay as they are.
"""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SUBSPACES = ("randomized", "svd")
MOMENTS = ("keep", "reset", "rotate")
NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)

_library = torch.library.Library("lowrank", "DEF")

_ADAM = "float beta1, float beta2, float eps, float weight_decay"
_GUARDS = "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(z!)? skipped=None"

SCHEMAS = {
    # W <- (1 - lr*weight_decay) W - lr*scale*back(Adam(project(G)))
    # The tensor overload comes first: a 0-dim tensor given to an int argument would be accepted through .item().
    "galore_step.tensor": "(Tensor(a!) param, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, "
    f"Tensor step, Tensor lr, {_ADAM}, float scale, bool left) -> ()",
    "galore_step": "(Tensor(a!) param, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, "
    f"SymInt step, float lr, {_ADAM}, float scale, bool left) -> ()",
    "galore_step.list": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] bases, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, "
    f"Tensor lr, {_ADAM}, float scale, bool left, {_GUARDS}) -> ()",
    # The same, from a gradient that is already projected.
    "subspace_step.tensor": "(Tensor(a!) param, Tensor low_rank_grad, Tensor basis, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, Tensor step, Tensor lr, {_ADAM}, float scale, bool left) -> ()",
    "subspace_step": "(Tensor(a!) param, Tensor low_rank_grad, Tensor basis, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, SymInt step, float lr, {_ADAM}, float scale, bool left) -> ()",
    "subspace_step.list": "(Tensor(a!)[] params, Tensor[] low_rank_grads, Tensor[] bases, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, "
    f"Tensor lr, {_ADAM}, float scale, bool left, {_GUARDS}) -> ()",
    # torch.optim.AdamW's step, element by element; an element whose gradient is not finite is skipped.
    "adamw_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor(d!)[] steps, *, Tensor lr, {_ADAM}, {_GUARDS}) -> ()",
    "project": "(Tensor grad, Tensor basis, *, bool left) -> Tensor",
    "back_project_": "(Tensor(a!) param, Tensor low_rank, Tensor basis, *, float alpha=1.0, float beta=1.0, bool left) -> ()",
    "channel_norms": "(Tensor grad, *, bool left) -> Tensor",
    "subspace_iteration": "(Tensor grad, Tensor? basis, *, SymInt rank, bool left, int n_iter=2, SymInt? oversample=None, "
    "int seed=0) -> (Tensor basis, Tensor energies)",
    # Advances the refresh schedule of many matrices by one step; countdowns are on the host.
    "refresh_": "(Tensor(a!)[] bases, Tensor[] grads, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    "str subspace, str moments) -> ()",
    # One Adafactor step of a parameter of any shape (no basis) or in a subspace.
    "adafactor_step": "(Tensor(a!) param, Tensor grad, Tensor? basis, Tensor(b!)? exp_avg, Tensor(c!)? row, Tensor(d!)? col, "
    "Tensor(e!)? exp_avg_sq, Tensor(f!) step, *, Tensor lr, float beta1, float decay_rate, float eps1, float eps2, "
    "float clip_threshold, float weight_decay, float scale, bool scale_parameter, bool relative_step, bool warmup_init, "
    "bool left, Tensor(z!)? skipped=None) -> ()",
}


def _expect(condition, op, message):
    torch._check(condition, lambda: f"{op}: {message()}")


def _expect_float(op, name, tensor):
    _expect(tensor.dtype in FLOATS, op, lambda: f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def _expect_dtype(op, name, tensor, dtype):
    _expect(tensor.dtype == dtype, op, lambda: f"{name} must be {dtype}, got {tensor.dtype}")


def _expect_like(op, name, tensor, shape, device):
    """`tensor` has `shape`, lies on `device` and is contiguous."""
    _expect(tensor.dim() == len(shape), op,
            lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for got, want in zip(tensor.shape, shape):
        _expect(got == want, op, lambda: f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    _expect(tensor.device == device, op, lambda: f"{name} must be on {device}, got {tensor.device}")
    _expect(tensor.is_contiguous(), op, lambda: f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def _expect_matrix(op, name, tensor):
    _expect(tensor.dim() == 2, op, lambda: f"{name} must be a matrix (m, n), got shape {tuple(tensor.shape)}")
    _expect_float(op, name, tensor)
    _expect(tensor.is_contiguous(), op, lambda: f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def _expect_scalar(op, name, tensor, device, own_device=False):
    """`tensor` is 0-dim; on `device`, or on the CPU as well unless it is written."""
    _expect(tensor.dim() == 0, op, lambda: f"{name} must be a 0-dim tensor, got shape {tuple(tensor.shape)}")
    fits = tensor.device == device or (tensor.device.type == "cpu" and not own_device)
    _expect(fits, op, lambda: f"{name} must be on {device}, got {tensor.device}")


def _expect_basis(op, matrix, basis, left):
    """`basis` (d, r) fits `matrix`: d its projected axis, r >= 1. A shard may have fewer than r rows, or none."""
    d = matrix.shape[0 if left else 1]
    axis = "m" if left else "n"
    _expect(basis.dim() == 2 and basis.shape[0] == d, op,
            lambda: f"basis must have shape ({axis} = {d}, r) for left={left}, got {tuple(basis.shape)}")
    _expect(basis.shape[1] >= 1, op, lambda: f"rank must be at least 1, got basis of shape {tuple(basis.shape)}")
    _expect_float(op, "basis", basis)
    _expect(basis.device == matrix.device, op, lambda: f"basis must be on {matrix.device}, got {basis.device}")
    _expect(basis.is_contiguous(), op, lambda: f"basis must be contiguous, got strides {tuple(basis.stride())}")


def low_rank_shape(matrix, basis, left):
    """Shape of R = project(matrix, basis)."""
    return (basis.shape[1], matrix.shape[1]) if left else (matrix.shape[0], basis.shape[1])


def check_project(grad, basis, *, left, op="project"):
    _expect_matrix(op, "grad", grad)
    _expect_basis(op, grad, basis, left)


def check_subspace_step(param, low_rank_grad, basis, exp_avg, exp_avg_sq, *, left, op="subspace_step"):
    _expect_matrix(op, "param", param)
    _expect_basis(op, param, basis, left)
    shape = low_rank_shape(param, basis, left)
    for name, tensor in (("low_rank_grad", low_rank_grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor is not None:
            _expect_like(op, name, tensor, shape, param.device)
            _expect_dtype(op, name, tensor, torch.float32)


def check_galore_step(param, grad, basis, exp_avg, exp_avg_sq, *, left, op="galore_step"):
    _expect_matrix(op, "param", param)
    _expect_float(op, "grad", grad)
    _expect_like(op, "grad", grad, param.shape, param.device)
    check_subspace_step(param, None, basis, exp_avg, exp_avg_sq, left=left, op=op)


def check_back_project(param, low_rank, basis, *, left, op="back_project_"):
    _expect_matrix(op, "param", param)
    _expect_basis(op, param, basis, left)
    _expect_like(op, "low_rank", low_rank, low_rank_shape(param, basis, left), param.device)
    _expect_dtype(op, "low_rank", low_rank, torch.float32)


def check_channel_norms(grad, *, op="channel_norms"):
    _expect_matrix(op, "grad", grad)


def check_subspace_iteration(grad, basis, *, rank, left, n_iter, oversample, op="subspace_iteration"):
    _expect_matrix(op, "grad", grad)
    m, n = grad.shape
    _expect(rank >= 1, op, lambda: f"rank must be at least 1, got {rank}")
    _expect(rank <= m and rank <= n, op, lambda: f"rank must be at most min(m, n) of grad ({m}, {n}), got {rank}")
    fewest = 0 if basis is None else 1
    _expect(n_iter >= fewest, op, lambda: f"n_iter must be at least {fewest}, got {n_iter}")
    _expect(oversample is None or oversample >= 0, op, lambda: f"oversample must be at least 0, got {oversample}")
    if basis is not None:
        _expect_basis(op, grad, basis, left)
        _expect(basis.shape[1] == rank, op, lambda: f"basis must have rank = {rank} columns, got {basis.shape[1]}")


def _expect_number(op, name, tensor, device):
    _expect_scalar(op, name, tensor, device)
    _expect(tensor.dtype in NUMBERS, op, lambda: f"{name} must be float32, float64, int32 or int64, got {tensor.dtype}")


def check_step_and_rate(op, device, step, lr):
    """step and lr, each a number or a 0-dim tensor."""
    if isinstance(step, torch.Tensor):
        _expect_number(op, "step", step, device)
    else:
        _expect(step >= 1, op, lambda: f"step counts from 1, got {step}")
    if isinstance(lr, torch.Tensor):
        _expect_number(op, "lr", lr, device)


def check_lists(op, **lists):
    """All lists have one length."""
    (first, tensors), *rest = lists.items()
    for name, other in rest:
        _expect(len(other) == len(tensors), op,
                lambda: f"{name} must have {len(tensors)} tensors like {first}, got {len(other)}")


def check_guards(op, params, steps, lr, grad_scale, found_inf, skipped):
    """`skipped` is an int64 counter; the guards and the counters are 0-dim tensors of the parameters' device."""
    device = params[0].device if params else lr.device
    _expect_number(op, "lr", lr, device)
    for i, step in enumerate(steps):
        _expect_scalar(op, f"steps[{i}]", step, params[i].device, own_device=True)
        _expect_dtype(op, f"steps[{i}]", step, torch.float32)
    for i, param in enumerate(params):
        _expect(param.device == device, op, lambda: f"params[{i}] must be on {device} like params[0], got {param.device}")
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            _expect(tensor.numel() == 1, op, lambda: f"{name} must have one element, got shape {tuple(tensor.shape)}")
            _expect_dtype(op, name, tensor, torch.float32)
            _expect(tensor.device == device, op, lambda: f"{name} must be on {device}, got {tensor.device}")
    if skipped is not None:
        _expect_scalar(op, "skipped", skipped, device, own_device=True)
        _expect_dtype(op, "skipped", skipped, torch.int64)


def check_low_rank_lists(op, check, params, grads, bases, exp_avgs, exp_avg_sqs, steps, lr, left, guards):
    """The rules of the list forms of `galore_step` and `subspace_step`; `check` is the rule of one matrix."""
    check_lists(op, params=params, grads=grads, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_guards(op, params, steps, lr, *guards)
    for tensors in zip(params, grads, bases, exp_avgs, exp_avg_sqs):
        check(*tensors, left=left, op=op)


def check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, *, gap, first_gaps, seeds, subspace, moments,
                  op="refresh_"):
    check_lists(op, bases=bases, grads=grads, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    if moments != "keep":
        check_lists(op, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    _expect(gap >= 1, op, lambda: f"gap must be at least 1, got {gap}")
    _expect(subspace in SUBSPACES, op, lambda: f"subspace must be one of {', '.join(SUBSPACES)}, got {subspace!r}")
    _expect(moments in MOMENTS, op, lambda: f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
    _expect(min(first_gaps, default=1) >= 1, op, lambda: f"first_gaps must be at least 1, got {min(first_gaps)}")
    # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
    for i, c in enumerate(countdowns):
        fits = c.dtype == torch.int64 and c.dim() == 0 and c.device.type == "cpu"
        if not fits:
            _expect(fits, op, lambda: f"countdowns[{i}] must be a 0-dim int64 tensor on the CPU, got shape {tuple(c.shape)}, "
                    f"{c.dtype} on {c.device}")


def check_adafactor_step(param, grad, basis, exp_avg, row, col, exp_avg_sq, step, lr, *, left, skipped, op="adafactor_step"):
    _expect_float(op, "param", param)
    _expect_float(op, "grad", grad)
    _expect_like(op, "param", param, param.shape, param.device)
    _expect_like(op, "grad", grad, param.shape, param.device)
    shape = param.shape
    if basis is not None:
        check_project(grad, basis, left=left, op=op)
        shape = low_rank_shape(param, basis, left)
    factored = len(shape) == 2
    _expect((row is not None) == factored and (col is not None) == factored and (exp_avg_sq is None) == factored, op,
            lambda: "row and col are for matrices, exp_avg_sq for other shapes, "
            f"got a parameter of shape {tuple(param.shape)}")
    wanted = {"exp_avg": shape, "exp_avg_sq": shape, "row": (*shape[:1], 1), "col": (1, *shape[1:2])}
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("row", row), ("col", col)):
        if tensor is not None:
            _expect_like(op, name, tensor, wanted[name], param.device)
            _expect_dtype(op, name, tensor, torch.float32)
    check_guards(op, [param], [step], lr, None, None, skipped)


def check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, guards, op="adamw_step"):
    check_lists(op, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_guards(op, params, steps, lr, *guards)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        _expect_float(op, f"params[{i}]", param)
        _expect_float(op, f"grads[{i}]", grad)
        _expect_like(op, f"params[{i}]", param, param.shape, param.device)
        _expect_like(op, f"grads[{i}]", grad, param.shape, param.device)
        for name, moment in ((f"exp_avgs[{i}]", exp_avg), (f"exp_avg_sqs[{i}]", exp_avg_sq)):
            _expect_like(op, name, moment, param.shape, param.device)
            _expect_dtype(op, name, moment, torch.float32)


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"lowrank::{_name}", _schema, lib=_library, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name):
    return torch.library.register_fake(f"lowrank::{name}", lib=_library)


def _one_matrix_fake(op, check):
    def fake(param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left):
        check(param, grad, basis, exp_avg, exp_avg_sq, left=left, op=op)
        check_step_and_rate(op, param.device, step, lr)

    return fake


def _list_fake(op, check):
    def fake(params, grads, bases, exp_avgs, exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay, scale, left,
             grad_scale=None, found_inf=None, skipped=None):
        check_low_rank_lists(op, check, params, grads, bases, exp_avgs, exp_avg_sqs, steps, lr, left,
                             (grad_scale, found_inf, skipped))

    return fake


for _name, _rule in (("galore_step", check_galore_step), ("subspace_step", check_subspace_step)):
    _fake(f"{_name}.tensor")(_one_matrix_fake(_name, _rule))
    _fake(_name)(_one_matrix_fake(_name, _rule))
    _fake(f"{_name}.list")(_list_fake(_name, _rule))


@_fake("adamw_step")
def _(params, grads, exp_avgs, exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay, grad_scale=None, found_inf=None,
      skipped=None):
    check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, (grad_scale, found_inf, skipped))


@_fake("project")
def _(grad, basis, *, left):
    check_project(grad, basis, left=left)
    return grad.new_empty(low_rank_shape(grad, basis, left), dtype=torch.float32)


@_fake("back_project_")
def _(param, low_rank, basis, *, alpha=1.0, beta=1.0, left):
    check_back_project(param, low_rank, basis, left=left)


@_fake("channel_norms")
def _(grad, *, left):
    check_channel_norms(grad)
    return grad.new_empty(grad.shape[1 if left else 0], dtype=torch.float32)


@_fake("subspace_iteration")
def _(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0):
    check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    return (grad.new_empty((grad.shape[0 if left else 1], rank), dtype=torch.float32),
            grad.new_empty((rank,), dtype=torch.float32))


@_fake("refresh_")
def _(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, **arguments):
    check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, **arguments)
    for basis, grad in zip(bases, grads):
        check_project(grad, basis, left=left, op="refresh_")


@_fake("adafactor_step")
def _(param, grad, basis, exp_avg, row, col, exp_avg_sq, step, *, lr, left, skipped=None, **hyper):
    check_adafactor_step(param, grad, basis, exp_avg, row, col, exp_avg_sq, step, lr, left=left, skipped=skipped)
