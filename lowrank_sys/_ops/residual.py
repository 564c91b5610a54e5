"""Steps that use the part of the gradient that a basis does not hold: APOLLO, Fira, FRUGAL."""

import torch

from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    expect_scalar,
    fake,
    low_rank_shape,
)

ONE = "Tensor(a!) param, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq"
MANY = "Tensor(a!)[] params, Tensor[] grads, Tensor[] bases, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs"
NUMBERS = {".tensor": "Tensor step, Tensor lr", "": "SymInt step, float lr"}
APOLLO = "float scale, bool left, bool per_tensor=False, bool scale_front=False, float growth=1.01"
FIRA = "float alpha, bool left, float growth=1.01"
FRUGAL = "float scale, float residual_scale, bool sign, bool left"


def _overloads(name, one, many, hyper):
    """A step's three schemas; the tensor overload comes first: a 0-dim tensor for an int would be accepted through .item()."""
    schemas = {f"{name}{dot}": f"({ONE}{one}, *, {numbers}, {ADAM}, {hyper}) -> ()" for dot, numbers in NUMBERS.items()}
    return schemas | {f"{name}.list": f"({MANY}{many}, Tensor(d!)[] steps, *, Tensor lr, {ADAM}, {hyper}, {GUARDS}) -> ()"}


SCHEMAS = {
    # The basis is a matrix or the key of a Gaussian one; an empty list of limiters, or of Gram matrices, is none at all.
    **_overloads("apollo_step", ", Tensor(d!)? limiter=None", ", Tensor(e!)[] limiters", APOLLO),
    **_overloads("fira_step", ", Tensor(d!)? limiter=None, Tensor? gram=None", ", Tensor(e!)[] limiters, Tensor[] grams", FIRA),
    **_overloads("frugal_step", "", "", FRUGAL),
}


def is_key(basis):
    """Whether `basis` is the key of a Gaussian basis: seed, refresh, parameter and first row, int64 (4,)."""
    return basis.dtype == torch.int64


def _check_gradient(op, param, grad):
    expect_matrix(op, "param", param)
    expect_float(op, "grad", grad)
    expect_like(op, "grad", grad, param.shape, param.device)


def _check_moments(op, param, exp_avg, exp_avg_sq, shape):
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        expect_like(op, name, tensor, shape, param.device)
        expect_dtype(op, name, tensor, torch.float32)


def _check_limiter(op, param, limiter):
    if limiter is not None:
        expect_scalar(op, "limiter", limiter, param.device, own_device=True)
        expect_dtype(op, "limiter", limiter, torch.float32)


def _expect_stored(op, matrix, basis, exp_avg, exp_avg_sq, left):
    expect_basis(op, matrix, basis, left)
    _check_moments(op, matrix, exp_avg, exp_avg_sq, low_rank_shape(matrix, basis, left))


def _check_stored(op, param, grad, basis, exp_avg, exp_avg_sq, left):
    _check_gradient(op, param, grad)
    _expect_stored(op, param, basis, exp_avg, exp_avg_sq, left)


def check_apollo_gradient(op, grad, basis, exp_avg, exp_avg_sq, limiter, left):
    """The rules of APOLLO but those of the weight, whose shape and device the gradient has."""
    if is_key(basis):
        expect_like(op, "basis", basis, (4,), grad.device)
        wanted = "(r, n)" if left else "(m, r)"
        expect(exp_avg.dim() == 2, op, lambda: f"exp_avg must be a matrix {wanted}, got shape {tuple(exp_avg.shape)}")
        rank = exp_avg.shape[0 if left else 1]
        expect(rank >= 1, op, lambda: f"rank must be at least 1, got exp_avg of shape {tuple(exp_avg.shape)}")
        shape = (rank, grad.shape[1]) if left else (grad.shape[0], rank)
        _check_moments(op, grad, exp_avg, exp_avg_sq, shape)
    else:
        _expect_stored(op, grad, basis, exp_avg, exp_avg_sq, left)
    _check_limiter(op, grad, limiter)


def check_apollo_step(param, grad, basis, exp_avg, exp_avg_sq, limiter=None, *, left, op="apollo_step"):
    _check_gradient(op, param, grad)
    check_apollo_gradient(op, grad, basis, exp_avg, exp_avg_sq, limiter, left)


def check_fira_step(param, grad, basis, exp_avg, exp_avg_sq, limiter=None, gram=None, *, left, op="fira_step"):
    _check_stored(op, param, grad, basis, exp_avg, exp_avg_sq, left)
    _check_limiter(op, param, limiter)
    if gram is not None:
        expect_like(op, "gram", gram, (basis.shape[1], basis.shape[1]), param.device)
        expect_dtype(op, "gram", gram, torch.float32)


def check_frugal_step(param, grad, basis, exp_avg, exp_avg_sq, *, left, op="frugal_step"):
    _check_stored(op, param, grad, basis, exp_avg, exp_avg_sq, left)


def _or_none(tensors, params):
    return tensors if tensors else [None] * len(params)


def check_list(op, check, params, grads, bases, exp_avgs, exp_avg_sqs, extras, steps, lr, left, guards):
    """The rules of a list form. extras: name -> list that may be empty; returns them, None in every place of an empty one."""
    check_lists(
        op,
        params=params,
        grads=grads,
        bases=bases,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        **{name: tensors for name, tensors in extras.items() if tensors},
        steps=steps,
    )
    check_guards(op, params, steps, lr, *guards)
    full = [_or_none(tensors, params) for tensors in extras.values()]
    for tensors in zip(params, grads, bases, exp_avgs, exp_avg_sqs, *full):
        check(*tensors, left=left, op=op)
    return full


define(SCHEMAS)


def _one_matrix_fake(op, check):
    def fake(param, grad, basis, exp_avg, exp_avg_sq, *extras, step, lr, left, **hyper):
        check(param, grad, basis, exp_avg, exp_avg_sq, *extras, left=left, op=op)
        check_step_and_rate(op, param.device, step, lr)

    return fake


def _list_fake(op, check, names):
    def fake(params, grads, bases, exp_avgs, exp_avg_sqs, *rest, lr, left, grad_scale=None, found_inf=None, skipped=None, **hyper):
        *extras, steps = rest
        check_list(
            op,
            check,
            params,
            grads,
            bases,
            exp_avgs,
            exp_avg_sqs,
            dict(zip(names, extras)),
            steps,
            lr,
            left,
            (grad_scale, found_inf, skipped),
        )

    return fake


for _name, _rule, _names in (
    ("apollo_step", check_apollo_step, ("limiters",)),
    ("fira_step", check_fira_step, ("limiters", "grams")),
    ("frugal_step", check_frugal_step, ()),
):
    fake(f"{_name}.tensor")(_one_matrix_fake(_name, _rule))
    fake(_name)(_one_matrix_fake(_name, _rule))
    fake(f"{_name}.list")(_list_fake(_name, _rule, _names))
