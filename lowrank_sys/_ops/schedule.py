"""Refresh schedules of what is no matrix: the key of a Gaussian basis, and the rows of a structured sparse one."""

import torch

from lowrank_sys._ops import subspace
from lowrank_sys._ops.rules import check_lists, define, expect, expect_float, expect_matrix, fake
from lowrank_sys._ops.sparse import METHODS, expect_indices, expect_row_scale, selected_shape

# There is no product of two such bases to rotate by.
MOMENTS = ("keep", "reset")
STATE = "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr"

SCHEMAS = {
    # keys: int64 (4,), see _ops.residual.is_key; countdowns are on the host.
    "refresh_keys_": f"(Tensor(a!)[] keys, Tensor(b!)[] countdowns, {STATE}, *, int gap, str moments) -> ()",
    # row_scales is empty where rows have none; refreshes count the selections so far, on the host too.
    "refresh_rows_": f"(Tensor(a!)[] indices, Tensor(f!)[] row_scales, Tensor[] grads, Tensor(b!)[] countdowns, "
    f"Tensor(g!)[] refreshes, {STATE}, *, bool left, int gap, int[] first_gaps, int[] seeds, int[] parameters, str method, "
    "str moments) -> ()",
}


def _check_moments(op, moments):
    expect(moments in MOMENTS, op, lambda: f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")


def check_refresh_keys(keys, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, gap, moments, op="refresh_keys_"):
    check_lists(op, keys=keys, countdowns=countdowns)
    _check_moments(op, moments)
    if moments == "reset":
        check_lists(op, keys=keys, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    subspace.check_schedule(op, countdowns, lr, gap, (), moments)
    for i, key in enumerate(keys):
        fits = key.dtype == torch.int64 and key.shape == (4,) and key.is_contiguous()
        if not fits:
            expect(
                fits,
                op,
                lambda: (
                    f"keys[{i}] must be a contiguous int64 tensor of shape (4,), got {key.dtype} of shape "
                    f"{tuple(key.shape)}, strides {tuple(key.stride())}"
                ),
            )
    for i in range(len(keys) if moments == "reset" else 0):
        subspace.check_adam_state(op, exp_avgs[i].shape, keys[i].device, exp_avgs[i], exp_avg_sqs[i], steps[i])


def check_refresh_rows(
    indices,
    row_scales,
    grads,
    countdowns,
    refreshes,
    exp_avgs,
    exp_avg_sqs,
    steps,
    lr,
    *,
    gap,
    first_gaps,
    seeds,
    parameters,
    method,
    moments,
    op="refresh_rows_",
):
    check_lists(
        op,
        indices=indices,
        grads=grads,
        countdowns=countdowns,
        refreshes=refreshes,
        first_gaps=first_gaps,
        seeds=seeds,
        parameters=parameters,
        **(dict(row_scales=row_scales) if row_scales else {}),
    )
    _check_moments(op, moments)
    if moments == "reset":
        check_lists(op, indices=indices, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    expect(method in METHODS, op, lambda: f"method must be one of {', '.join(METHODS)}, got {method}")
    subspace.check_schedule(op, countdowns, lr, gap, first_gaps, moments)
    subspace.check_on_host(op, "refreshes", refreshes)


def check_refresh_rows_matrix(index, row_scale, grad, exp_avg, exp_avg_sq, step, *, left, op="refresh_rows_"):
    """The rules of a matrix that is due; the Adam state is None where the moments are kept."""
    expect_matrix(op, "grad", grad)
    expect_float(op, "grad", grad)
    expect_indices(op, index, grad.device)
    expect_row_scale(op, "row_scale", row_scale, index)
    rows, r = grad.shape[0 if left else 1], index.shape[0]
    expect(r <= rows, op, lambda: f"indices must be at most the {rows} rows that can be selected, got {r}")
    if step is not None:
        subspace.check_adam_state(op, selected_shape(grad, index, left), grad.device, exp_avg, exp_avg_sq, step)


def refresh_rows_matrix(i, indices, row_scales, grads, exp_avgs, exp_avg_sqs, steps, moments):
    """Arguments of `check_refresh_rows_matrix` for matrix i."""
    state = (None,) * 3 if moments == "keep" else (exp_avgs[i], exp_avg_sqs[i], steps[i])
    return indices[i], row_scales[i] if row_scales else None, grads[i], *state


define(SCHEMAS)


@fake("refresh_keys_")
def _(keys, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, gap, moments):
    check_refresh_keys(keys, countdowns, exp_avgs, exp_avg_sqs, steps, lr, gap=gap, moments=moments)


@fake("refresh_rows_")
def _(indices, row_scales, grads, countdowns, refreshes, exp_avgs, exp_avg_sqs, steps, lr, *, left, **arguments):
    check_refresh_rows(indices, row_scales, grads, countdowns, refreshes, exp_avgs, exp_avg_sqs, steps, lr, **arguments)
    for i in range(len(indices)):
        matrix = refresh_rows_matrix(i, indices, row_scales, grads, exp_avgs, exp_avg_sqs, steps, arguments["moments"])
        check_refresh_rows_matrix(*matrix, left=left)
