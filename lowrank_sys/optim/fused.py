"""The fused steps: one op for a whole batch, by what its parts are. Whatever is not in the table takes the general route.

A row is (weight, basis, moments, rule, remainder) by their names, and a function of (batch, lr) that calls the op.
"""

from itertools import product

import torch

from lowrank_sys._ops.step import BASES, MOMENTS, RULES, WEIGHTS
from lowrank_sys.optim.weight import by_rows, put_back, weight_store
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.moments import is_by_row
from lowrank_sys.subspace.select import gram_of

ops = torch.ops.lowrank


def _adam(group):
    """The ops' names of Adam's group keys."""
    beta1, beta2 = group["betas"]
    return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}


def _states(batch, moments):
    """The columns that ops take as states: the moments, and limiters where they are kept."""
    keys = (*MOMENTS[moments], *(("limiter",) if "limiter" in batch.states[0] else ()))
    return [tensor for key in keys for tensor in batch.column(key)]


def _grams(batch):
    """BᵀB of bases that are not orthonormal, else none."""
    grams = [gram_of(state, axis_of(param.shape, state), batch.group) for param, state in zip(batch.params, batch.states)]
    return [] if grams[0] is None else grams


def _low_rank(batch, lr):
    weights, store = batch.store, store_of(batch.states[0])
    weight, basis, moments, rule, remainder = names_of(batch.params[0], batch.states[0], batch.rule, batch.remainder)
    bases, *parts = map(batch.column, store.keys)
    parts = [tensor for column in parts for tensor in column]
    if remainder == "scaled-residual" and "limiter" in batch.states[0]:
        parts += _grams(batch)
    kept = {f"basis_{key}": value for key, value in store.options.items()}
    ops.step(
        *weights.tensors(batch.written), batch.gradients, bases, parts, _states(batch, moments), batch.column("step"), lr=lr,
        weight=weight, basis=basis, moments=moments, rule=rule, remainder=remainder, left=batch.left, projected=batch.projected,
        int8_gemm=batch.group.get("int8_gemm", False), **batch.remainder.options(batch.group), **kept,
        **weights.options(batch.group, batch.states), **_adam(batch.group), **batch.guards,
    )  # fmt: skip


def _rows(batch, lr):
    ops.step.rows(
        batch.written, batch.gradients, batch.column("indices"),
        batch.column("row_scale") if "row_scale" in batch.states[0] else [], *map(batch.column, MOMENTS["fp32"]),
        batch.column("step"), lr=lr, scale=batch.group["scale"], left=batch.left,
        **batch.store.options(batch.group, batch.states), **_adam(batch.group), **batch.guards,
    )  # fmt: skip


def _adamw(batch, lr):
    op = ops.adam_8bit_ if "exp_avg_absmax" in batch.states[0] else ops.adamw_step
    moments = _moments_of(batch.states[0])
    op(
        batch.written, batch.gradients, *map(batch.column, MOMENTS[moments]), batch.column("step"), lr=lr, **_adam(batch.group),
        **batch.store.options(batch.group, batch.states), **batch.guards,
    )  # fmt: skip


def _moments_of(state):
    return "8bit" if "exp_avg_absmax" in state else "fp32"


FUSED = {
    (weight, basis, moments, rule, remainder): _low_rank
    for weight, basis, moments, (remainder, rule) in product(WEIGHTS, BASES, MOMENTS, RULES.items())
    if basis != "key" or remainder == "scaled-gradient"
}
FUSED |= {
    ("float", "rows", "fp32", "adam", "none"): _rows,
    ("float", None, "fp32", "adam", "none"): _adamw,
    ("float", None, "8bit", "adam", "none"): _adamw,
}


def names_of(param, state, rule, remainder, group=None):
    """The row of the table that one matrix belongs to."""
    store = store_of(state)
    return weight_store(param, group).name, None if store is None else store.name, _moments_of(state), rule.name, remainder.name


def fused(batch):
    """The step of this batch, a function of (batch, lr), or None where only the general route takes it."""
    if not batch.has_subspace and is_by_row(batch.states[0], "exp_avg"):
        return None  # the op without a basis takes blocks that cross rows
    step = FUSED.get(names_of(batch.params[0], batch.states[0], batch.rule, batch.remainder, batch.group))
    served = not batch.projected or (step is _low_rank and batch.remainder.from_low_rank)
    if "sums" in batch.states[0] and batch.remainder.sums(batch.group):  # over rows of other processes
        return None
    return step if served else None


def run(step, batch, lr):
    """Take a fused step of weights that may not lie in rows."""
    batch.written = by_rows(batch.params) if not batch.store.int8 else batch.params
    step(batch, lr)
    if not batch.store.int8:
        put_back(batch.params, batch.written)
