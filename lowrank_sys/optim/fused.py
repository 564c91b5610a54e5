"""The fused steps: one op for a whole batch, by what its parts are. Whatever is not in the table takes the general route.

A row is (weight, basis, moments, rule, remainder) by their names, and a function of (batch, method) that calls the op.
"""

import torch

from lowrank_sys.optim.remainder import GROWTH
from lowrank_sys.optim.weight import by_rows, put_back, weight_store
from lowrank_sys.subspace.basis import load, store_of
from lowrank_sys.subspace.select import gram_of

CODED = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
ops = torch.ops.lowrank


def _adam(group):
    """The ops' names of Adam's group keys."""
    beta1, beta2 = group["betas"]
    return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}


def _moments(batch):
    return batch.column("exp_avg"), batch.column("exp_avg_sq")


def _bases(batch):
    """Lists of the tensors of the bases, in the order of the ops."""
    return [batch.column(key) for key in store_of(batch.states[0]).keys]


def _limiters(batch):
    return batch.column("limiter") if "limiter" in batch.states[0] else []


def _grams(batch):
    """BᵀB of bases that are not orthonormal, else none."""
    grams = [gram_of(basis, batch.group) for basis in batch.column("basis")]
    return [] if grams[0] is None else grams


def _common(batch, lr):
    return {"lr": lr, "left": batch.left, **_adam(batch.group), **batch.guards}


def _galore(batch, method, lr):
    op = (ops.subspace_step if batch.projected else ops.galore_step).list
    op(
        batch.written, batch.gradients, *_bases(batch), *_moments(batch), batch.column("step"), scale=batch.group["scale"],
        int8_gemm=batch.group["int8_gemm"], **_common(batch, lr),
    )  # fmt: skip


def _galore_int4(batch, method, lr):
    """The basis of one matrix at a time is decoded for its step."""
    op = (ops.subspace_step if batch.projected else ops.galore_step).list
    for weight, param, gradient, state in zip(batch.written, batch.params, batch.gradients, batch.states):
        op(
            [weight], [gradient], [load(state, param)], [state["exp_avg"]], [state["exp_avg_sq"]], [state["step"]],
            scale=batch.group["scale"], **_common(batch, lr),
        )  # fmt: skip


def _galore_8bit(batch, method, lr):
    store = store_of(batch.states[0])
    op = getattr(ops.subspace_step_8bit if batch.projected else ops.galore_step_8bit, store.overload)
    op(
        batch.written, batch.gradients, *_bases(batch), *map(batch.column, CODED), batch.column("step"),
        scale=batch.group["scale"], **store.options, **_common(batch, lr),
    )  # fmt: skip


def _qgalore(batch, method, lr):
    weights, store = weight_store(batch.params[0]), store_of(batch.states[0])
    op = (ops.qgalore_subspace_step if batch.projected else ops.qgalore_step).list
    op(
        *weights.tensors(batch.params), batch.gradients, *[*_bases(batch), [], []][:3], *map(batch.column, CODED),
        batch.column("step"), scale=batch.group["scale"], **{f"basis_{key}": value for key, value in store.options.items()},
        **weights.options(batch.group, batch.states), **_common(batch, lr),
    )  # fmt: skip


def _apollo(batch, method, lr):
    weights = weight_store(batch.params[0])
    (ops.apollo_int8_step if weights.int8 else ops.apollo_step).list(
        *([batch.written] if not weights.int8 else weights.tensors(batch.params)), batch.gradients, *_bases(batch),
        *_moments(batch), _limiters(batch), batch.column("step"), scale=batch.group["scale"],
        per_tensor=batch.group["scale_type"] == "tensor", scale_front=method.remainder.front, growth=GROWTH,
        **weights.options(batch.group, batch.states), **_common(batch, lr),
    )  # fmt: skip


def _fira(batch, method, lr):
    ops.fira_step.list(
        batch.written, batch.gradients, *_bases(batch), *_moments(batch), _limiters(batch), _grams(batch), batch.column("step"),
        alpha=batch.group["alpha"], growth=GROWTH, **_common(batch, lr),
    )  # fmt: skip


def _frugal(batch, method, lr):
    ops.frugal_step.list(
        batch.written, batch.gradients, *_bases(batch), *_moments(batch), batch.column("step"), scale=batch.group["scale"],
        residual_scale=batch.group["residual_scale"], sign=method.remainder.sign, **_common(batch, lr),
    )  # fmt: skip


def _grass(batch, method, lr):
    ops.grass_step.list(
        batch.written, batch.gradients, batch.column("indices"),
        batch.column("row_scale") if "row_scale" in batch.states[0] else [], *_moments(batch), batch.column("step"),
        scale=batch.group["scale"], **_common(batch, lr),
    )  # fmt: skip


def _adamw(batch, method, lr):
    ops.adamw_step(
        batch.written, batch.gradients, *_moments(batch), batch.column("step"), lr=lr, **_adam(batch.group), **batch.guards
    )


def _adamw_8bit(batch, method, lr):
    ops.adam_8bit_(
        batch.written, batch.gradients, *map(batch.column, CODED), batch.column("step"), lr=lr, **_adam(batch.group), **batch.guards
    )


FUSED = {
    ("float", "dense", "fp32", "adam", "none"): _galore,
    ("float", "int4", "fp32", "adam", "none"): _galore_int4,
    ("float", "dense", "8bit", "adam", "none"): _galore_8bit,
    ("float", "int4", "8bit", "adam", "none"): _galore_8bit,
    ("int8", "dense", "8bit", "adam", "none"): _qgalore,
    ("int8", "int4", "8bit", "adam", "none"): _qgalore,
    ("float", "dense", "fp32", "ratio-adam", "scaled-gradient"): _apollo,
    ("float", "key", "fp32", "ratio-adam", "scaled-gradient"): _apollo,
    ("int8", "dense", "fp32", "ratio-adam", "scaled-gradient"): _apollo,
    ("int8", "key", "fp32", "ratio-adam", "scaled-gradient"): _apollo,
    ("float", "dense", "fp32", "ratio-adam", "scaled-residual"): _fira,
    ("float", "dense", "fp32", "adam", "state-free"): _frugal,
    ("float", "rows", "fp32", "adam", "none"): _grass,
    ("float", None, "fp32", "adam", "none"): _adamw,
    ("float", None, "8bit", "adam", "none"): _adamw_8bit,
}

# Fused steps that start from R as well: their remainder is dropped, and their basis comes from a sketch.
FROM_LOW_RANK = (_galore, _galore_int4, _galore_8bit, _qgalore)


def names_of(param, state, rule, remainder):
    """The row of the table that one matrix belongs to."""
    store = store_of(state)
    coded = "8bit" if "exp_avg_absmax" in state else "fp32"
    return weight_store(param).name, None if store is None else store.name, coded, rule.name, remainder.name


def fused(batch, method):
    """The step of this batch, a function of (batch, method, lr), or None where only the general route takes it."""
    step = FUSED.get(names_of(batch.params[0], batch.states[0], batch.rule, batch.remainder))
    return None if step is None or (batch.projected and step not in FROM_LOW_RANK) else step


def run(step, batch, method, lr):
    """Take a fused step of weights that may not lie in rows."""
    batch.written = by_rows(batch.params) if not weight_store(batch.params[0]).int8 else batch.params
    step(batch, method, lr)
    if not weight_store(batch.params[0]).int8:
        put_back(batch.params, batch.written)
