"""Q-GaLore on the GPU: project on an INT4 basis, 8-bit Adam on R, back-project into INT8 weights.

W exists as codes only: the back-projection's epilogue dequantizes a tile in registers, updates it and rounds it stochastically.
"""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.back_project import back_tile
from lowrank_sys.kernels.basis import Int4Basis, arguments, rank
from lowrank_sys.kernels.common import ALPHA, DECAY, SLOTS, is_off, on_device_of, pick, precision
from lowrank_sys.kernels.galore import launches
from lowrank_sys.kernels.int8 import aligned, count_left_out, update_int8
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.scalars import advance, as_scalar, one_row


@triton.jit(do_not_specialize=["seed", "parameter", "first"], do_not_specialize_on_alignment=["step"])
def back_project_int8_kernel(
    codes,
    weight_scale,
    low_rank,
    basis,
    scale,
    offset,
    scalars,
    step,
    skipped,
    seed,
    parameter,
    first,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    INT8_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W <- decay * W + alpha * (B X if LEFT, else X Bᵀ) for an INT8 weight, rounded stochastically in place.

    Q-GaLore (Zhang et al. 2024, section 3.4), with the rules of `update_int8`; X is NaN in a channel that is left out. A STEP
    counts such weights in `skipped`, and the whole launch may be switched off. With scale and offset, the basis is in INT4, see
    `load_int4`; `width` bytes hold a vector. step (int64) is on the device; `first` is the index of element (0, 0) in the unsharded
    tensor.

    Bytes: codes and their scales read once and written once; X once per tile of rows if LEFT (else of columns), B once per tile of
    the other axis.
    """
    basis = pick(basis, 0)
    if GROUP:
        scale, offset = pick(scale, 0), pick(offset, 0)
    if STEP:
        if is_off(scalars):
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    b_back = back_tile(low_rank, basis, scale, offset, i_m, i_n, m, n, r, width, LEFT, PRECISION, GROUP, BLOCK_M, BLOCK_N, BLOCK_R)
    update_int8(
        b_back,
        codes,
        weight_scale,
        i_m,
        i_n,
        m,
        n,
        tl.load(scalars + ALPHA),
        tl.load(scalars + DECAY),
        seed,
        tl.load(step),
        parameter,
        first,
        INT8_GROUP,
        ALIGNED,
        BLOCK_M,
        BLOCK_N,
    )
    m_m, m_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M) < m, i_n * BLOCK_N + tl.arange(0, BLOCK_N) < n
    count_left_out(skipped, b_back, m_m[:, None] & m_n[None, :])


def counter_steps(steps):
    """Steps (float64) of the random bits' counter, int64: the kernel takes their lowest 32 bits. Not finite, or huge: 0."""
    return torch.where(steps.abs() < 2.0**62, steps, 0.0).to(torch.int64)


def launch_back_project_int8(
    codes, weight_scale, low_rank, basis, scalars, step, *, left, is_step, seed, parameter, offset, group_size, skipped=None
):
    """W <- scalars[DECAY] W + scalars[ALPHA] back(X). low_rank: R's shape; basis: a matrix or an `Int4Basis`."""
    if codes.numel() == 0:
        return
    m, n = codes.shape
    r = rank(basis)
    config = configs.back_project_int8(n=n, r=r, dtypes=(low_rank.dtype, basis.dtype), group_size=group_size, offset=offset)
    back_project_int8_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]),](
        codes=codes,
        weight_scale=weight_scale,
        low_rank=low_rank,
        **arguments([basis]),
        scalars=scalars,
        step=step,
        skipped=skipped,
        seed=seed,
        parameter=parameter,
        first=offset,
        m=m,
        n=n,
        r=r,
        LEFT=left,
        STEP=is_step,
        PRECISION=precision(),
        INT8_GROUP=group_size,
        ALIGNED=aligned(n, offset),
        **config,
        **configs.OPTIONS,
    )


def _basis(basis, basis_scale, basis_offset, group_size):
    return basis if basis_scale is None else Int4Basis(basis, basis_scale, basis_offset, group_size)


def back_project_int8_(
    codes,
    scale,
    low_rank,
    basis,
    basis_scale=None,
    basis_offset=None,
    *,
    alpha=1.0,
    decay=1.0,
    left,
    seed,
    step,
    parameter,
    offset=0,
    group_size=256,
    basis_group_size=256,
):
    """W <- decay W + alpha back(X) for an INT8 weight (m, n), rounded stochastically; types and rules as the oracle's."""
    _ops.qgalore.check_back_project_int8(
        codes,
        scale,
        low_rank,
        basis,
        basis_scale,
        basis_offset,
        alpha=alpha,
        decay=decay,
        left=left,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )
    device = codes.device
    with on_device_of(codes):
        scalars = torch.zeros(SLOTS.value, dtype=torch.float32, device=device)
        for slot, value in ((ALPHA, alpha), (DECAY, decay)):
            scalars[slot.value] = as_scalar(value, device)
        launch_back_project_int8(
            codes,
            scale,
            low_rank,
            _basis(basis, basis_scale, basis_offset, basis_group_size),
            scalars,
            counter_steps(as_scalar(step, device).double()),
            left=left,
            is_step=False,
            seed=seed,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
        )


def _update(
    codes,
    weight_scales,
    gradients,
    bases,
    *moments_and_steps,
    parameters,
    offsets,
    scalars,
    counts,
    projected,
    left,
    beta1,
    beta2,
    eps,
    seed,
    group_size,
    counters,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    """Matrices of one shape: G, or R if `projected` -> Adam's updates X -> W."""
    low_rank_grads = gradients
    if not projected:
        low_rank_grads = [
            torch.empty(_ops.qgalore.low_rank_shape(code, *_of(basis), left), dtype=torch.float32, device=code.device)
            for code, basis in zip(codes, bases)
        ]
        launch_project(gradients, bases, low_rank_grads, left=left, counters=counters)
    # A 16-bit X keeps the second product on the 16-bit tensor cores.
    updates = [torch.empty_like(r, dtype=basis.dtype) for r, basis in zip(low_rank_grads, bases)]
    torch.ops.lowrank.adam_8bit_low_rank_(
        low_rank_grads,
        updates,
        *moments_and_steps,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for i, (code, weight_scale, update, basis) in enumerate(zip(codes, weight_scales, updates, bases)):
        launch_back_project_int8(
            code,
            weight_scale,
            update,
            basis,
            scalars[i],
            counts[i],
            left=left,
            is_step=True,
            seed=seed,
            parameter=parameters[i],
            offset=offsets[i],
            group_size=group_size,
            skipped=skipped,
        )


def _of(basis):
    """(the tensor that is called the basis, its scale or None)."""
    return (basis.packed, basis.scale) if isinstance(basis, Int4Basis) else (basis, None)


def _one(op, projected):
    def one(
        codes,
        weight_scale,
        gradient,
        basis,
        basis_scale,
        basis_offset,
        *moments,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        left,
        seed,
        parameter,
        offset=0,
        group_size=256,
        basis_group_size=256,
    ):
        _ops.qgalore.check_qgalore(
            op,
            codes,
            weight_scale,
            gradient,
            basis,
            basis_scale,
            basis_offset,
            *moments,
            projected=projected,
            left=left,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
            basis_group_size=basis_group_size,
        )
        _ops.rules.check_step_and_rate(op, codes.device, step, lr)
        with on_device_of(codes):
            step = as_scalar(step, codes.device)
            scalars, counts = one_row(
                step, codes.device, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, scale=scale, draws=True
            )
            tensors = (
                codes,
                weight_scale,
                gradient,
                _basis(basis, basis_scale, basis_offset, basis_group_size),
                *moments,
                step.to(torch.float32),
            )
            _update(
                *([tensor] for tensor in tensors),
                parameters=[parameter],
                offsets=[offset],
                scalars=scalars,
                counts=counts,
                projected=projected,
                left=left,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                seed=seed,
                group_size=group_size,
                counters=None if projected else counters_of(codes.device),
            )

    return one


def _many(op, projected):
    def many(
        *lists,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        left,
        seed,
        parameters,
        offsets=(),
        group_size=256,
        basis_group_size=256,
        grad_scale=None,
        found_inf=None,
        skipped=None,
    ):
        rows = _ops.qgalore.check_qgalore_list(
            op,
            *lists,
            projected=projected,
            lr=lr,
            left=left,
            parameters=parameters,
            offsets=offsets,
            group_size=group_size,
            basis_group_size=basis_group_size,
            guards=(grad_scale, found_inf, skipped),
        )
        if not rows:
            return
        codes, weight_scales, gradients, *basis_parts, m, v, m_absmax, v_absmax, parameters, offsets = map(list, zip(*rows))
        bases = [_basis(*parts, basis_group_size) for parts in zip(*basis_parts)]
        steps = lists[-1]
        columns = (codes, weight_scales, gradients, bases, m, v, m_absmax, v_absmax, steps)
        with on_device_of(codes[0]):
            order = list(launches(codes, gradients, bases))
            scalars, counts = advance(
                [steps[i] for launch in order for i in launch],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                scale=scale,
                grad_scale=grad_scale,
                found_inf=found_inf,
                draws=True,
            )
            sizes = [len(launch) for launch in order]
            counters = None if projected else counters_of(codes[0].device)
            for launch, its_scalars, its_counts in zip(order, scalars.split(sizes), counts.split(sizes)):
                _update(
                    *([items[i] for i in launch] for items in columns),
                    parameters=[parameters[i] for i in launch],
                    offsets=[offsets[i] for i in launch],
                    scalars=its_scalars,
                    counts=its_counts,
                    projected=projected,
                    left=left,
                    beta1=beta1,
                    beta2=beta2,
                    eps=eps,
                    seed=seed,
                    group_size=group_size,
                    counters=counters,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                    skipped=skipped,
                )

    return many


# Shapes, types and state as the oracle's functions of these names.
qgalore_step, qgalore_step_list = _one("qgalore_step", False), _many("qgalore_step", False)
qgalore_subspace_step = _one("qgalore_subspace_step", True)
qgalore_subspace_step_list = _many("qgalore_subspace_step", True)
