"""Back-projection into INT8 weights (Q-GaLore, Zhang et al. 2024), with the rounding of `int8_update_`."""

from lowrank_sys import _ops
from lowrank_sys.reference.galore import back
from lowrank_sys.reference.int4 import dequantize_int4
from lowrank_sys.reference.int8 import int8_update_


def dense_basis(basis, basis_scale, basis_offset, *, d, group_size):
    """The basis (d, r): itself, or the values of its INT4 codes."""
    if basis_scale is None:
        return basis
    return dequantize_int4(basis, basis_scale, basis_offset, d=d, group_size=group_size)


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
    """W <- decay W + alpha back(X) for an INT8 weight, rounded stochastically, in place.

    codes (m, n) int8 and scale (m, ⌈n/group_size⌉) fp32 as in `quantize_int8`; low_rank X (r, n) if left, else (m, r), fp32;
    basis (m or n, r) fp32 | bf16 | fp16, or with basis_scale and basis_offset the packed codes of `quantize_int4` in groups of
    basis_group_size. alpha, decay, the random bits (seed, step, parameter, offset), scales that grow and shrink, and elements
    that are left out are those of `int8_update_` with back(X) as the update: a NaN in X leaves out its channel.
    """
    _ops.back_project_int8.check_back_project_int8(
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
    b = dense_basis(basis, basis_scale, basis_offset, d=codes.shape[0 if left else 1], group_size=basis_group_size)
    int8_update_(
        codes,
        scale,
        back(low_rank, b, left),
        alpha=alpha,
        decay=decay,
        seed=seed,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
    )
