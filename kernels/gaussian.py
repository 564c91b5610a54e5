"""A Gaussian basis, made from its seed once a call: the same bits as csrc/core/gaussian.h and the oracle.

An entry costs some hundred instructions, and a product reads it once for every tile of channels: it is made into scratch of the
basis' size, which the cache holds, and the products are those of any basis in fp32.
"""

import math

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.back_project import back_project_
from lowrank_sys.kernels.common import SLOTS, is_off, on_device_of, one_each, pick, store
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.reference import gaussian as reference

# A counter of Philox serves four rows that lie ROWS apart; a basis' counters have the tag in their second word.
ROWS = tl.constexpr(reference.ROWS)
GROUP = tl.constexpr(4 * reference.ROWS)
TAG = tl.constexpr(reference.TAG)
L0, L1, L2, L3, L4, L5, L6 = (tl.constexpr(c) for c in reference.LOG)
S0, S1, S2, S3 = (tl.constexpr(c) for c in reference.SINE)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in reference.COSINE)


@triton.jit
def normal_pair(b_first, b_second):
    """Two independent normals from two words: Box and Muller 1958, rounded as the oracle's, operation by operation."""
    b_u = ((b_first >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    b_shifted = b_u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    b_e = ((b_shifted >> 23) - 127).to(tl.float32)
    b_f = ((b_shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    b_p = (((((b_f * L0 + L1) * b_f + L2) * b_f + L3) * b_f + L4) * b_f + L5) * b_f + L6
    b_log = (b_e * 0.69314718 + (b_f + b_f * b_f * b_p)) * -2.0
    b_radius = tl.sqrt_rn(b_log)
    b_t = (((b_second >> 8) & 0x3FFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.384185791015625e-07 - 0.5
    b_y = b_t * b_t
    b_sine = (((b_y * S0 + S1) * b_y + S2) * b_y + S3) * b_t
    b_cosine = (((b_y * C0 + C1) * b_y + C2) * b_y + C3) * b_y + C4
    b_odd, b_upper = ((b_second >> 30) & 1) == 1, (b_second >> 31) == 1
    b_a, b_b = tl.where(b_odd, b_sine, b_cosine), tl.where(b_odd, b_cosine, b_sine)
    return b_radius * tl.where(b_odd != b_upper, -b_a, b_a), b_radius * tl.where(b_upper, -b_b, b_b)


@triton.jit
def four_rows(i_group, o_l, o_j, rank, gain, seed, refresh, parameter):
    """B[64 i_group + 16 k + o_l, o_j] for k = 0 ... 3; o_l and o_j broadcast against each other."""
    o_counter = (i_group.to(tl.int64) * ROWS + o_l) * rank + o_j
    c0, c1 = o_counter.to(tl.uint32), (o_counter >> 32).to(tl.uint32) | TAG
    zero = tl.zeros_like(c0)
    b_0, b_1, b_2, b_3 = tl.philox(seed, c0, c1, zero + refresh.to(tl.uint32), zero + parameter.to(tl.uint32))
    b_a, b_b = normal_pair(b_0, b_1)
    b_c, b_d = normal_pair(b_2, b_3)
    return b_a * gain, b_b * gain, b_c * gain, b_d * gain


@triton.jit
def which_basis(key, i_matrix, seed, refresh, parameter, first):
    """The four numbers that say which basis it is: from its key on the device, or as they were given."""
    if key is not None:
        key = pick(key, i_matrix)
        return tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    one = tl.full([], 1, tl.int64)
    return one * seed, one * refresh, one * parameter, one * first


@triton.jit
def gaussian_basis_kernel(out, key, scalars, seed, refresh, parameter, first, d, rank, gain, BLOCK_R: tl.constexpr):
    """out <- rows first ... first + d - 1 of the basis. A program makes 64 rows of BLOCK_R columns.

    A launch serves several matrices of one shape: out and, if given, the keys are tuples, scalars has a row a matrix.

    Bytes: out once, the key once a program.
    """
    i_matrix = tl.program_id(2)
    out = pick(out, i_matrix)
    if scalars is not None:
        if is_off(scalars + i_matrix * SLOTS):
            return
    seed, refresh, parameter, first = which_basis(key, i_matrix, seed, refresh, parameter, first)
    i_group = first // GROUP + tl.program_id(0)
    o_l = tl.arange(0, ROWS).to(tl.int64)[:, None]
    o_j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
    b_rows = four_rows(i_group, o_l, o_j, rank, gain, seed, refresh, parameter)
    for k in tl.static_range(4):
        o_d = i_group * GROUP + k * ROWS + o_l - first
        store(out + o_d * rank + o_j, b_rows[k], (o_d >= 0) & (o_d < d) & (o_j < rank))


def gain(rank):
    """1/sqrt(rank), rounded to fp32 once."""
    return torch.tensor(1.0 / math.sqrt(rank), dtype=torch.float32).item()


def groups(first, d):
    """Groups of 64 rows that hold rows first ... first + d - 1."""
    return (first + d - 1) // GROUP.value - first // GROUP.value + 1


def launch_gaussian_bases(outs, *, keys=None, seed=0, step=0, parameter=0, first=0, scalars=None):
    """outs <- rows of the bases of (seed, step, parameter, first), or of `keys`, which hold these four on the device (int64).

    outs: matrices (d, rank) of one shape and type, fp32 | bf16 | fp16; scalars: a row a matrix, which may switch it off.
    """
    d, rank = outs[0].shape
    if outs[0].numel() == 0:
        return
    config = configs.GAUSSIAN_BASIS
    # Where the first row lies in its group is known on the device alone if there are keys.
    high = groups(first, d) if keys is None else configs.cdiv(d + GROUP.value - 1, GROUP.value)
    gaussian_basis_kernel[high, configs.cdiv(rank, config["BLOCK_R"]), len(outs)](
        out=one_each(outs),
        key=None if keys is None else one_each(keys),
        scalars=scalars,
        seed=seed,
        refresh=step,
        parameter=parameter,
        first=first,
        d=d,
        rank=rank,
        gain=gain(rank),
        **config,
        **configs.OPTIONS,
    )


def _basis(d, rank, device, **which):
    """The basis in fp32, made once: scratch of its size, which every tile of a product reads."""
    basis = torch.empty((d, rank), dtype=torch.float32, device=device)
    launch_gaussian_bases([basis], **which)
    return basis


def launch_gaussian_project(
    grad, out, *, left, counters, key=None, seed=0, step=0, parameter=0, first=0, squares=None, scalars=None
):
    """out <- R for the basis of (seed, step, parameter, first), or of `key`; squares as in `launch_project`."""
    basis = _basis(
        grad.shape[0 if left else 1],
        out.shape[0 if left else 1],
        grad.device,
        keys=None if key is None else [key],
        seed=seed,
        step=step,
        parameter=parameter,
        first=first,
        scalars=scalars,
    )
    return launch_project([grad], [basis], [out], left=left, counters=counters, squares=squares, scalars=scalars)


def gaussian_basis_(out, *, seed, step, parameter, first=0):
    """out <- rows first ... of the basis (d, rank) of N(0, 1/rank); out fp32 | bf16 | fp16. step counts refreshes."""
    _ops.gaussian.check_basis(out, first)
    with on_device_of(out):
        launch_gaussian_bases([out], seed=seed, step=step, parameter=parameter, first=first)


def gaussian_project(grad, *, rank, left, seed, step, parameter, first=0):
    """R = Bᵀ G (rank, n) if left, else G B (m, rank); fp32. grad (m, n) fp32 | bf16 | fp16; step counts refreshes, `first` is the
    index of the projected axis' first entry in the unsharded tensor."""
    _ops.gaussian.check_project(grad, rank, first)
    m, n = grad.shape
    out = torch.empty((rank, n) if left else (m, rank), dtype=torch.float32, device=grad.device)
    if out.numel():
        which = {"seed": seed, "step": step, "parameter": parameter, "first": first}
        with on_device_of(grad):
            launch_gaussian_project(grad, out, left=left, counters=counters_of(grad.device), **which)
    return out


def gaussian_back_project_(param, low_rank, *, alpha=1.0, beta=1.0, left, seed, step, parameter, first=0):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X (r, n) if left, else (m, r), fp32.

    beta = 0 does not depend on W, as in BLAS.
    """
    _ops.gaussian.check_back_project(param, low_rank, left, first)
    if param.numel() == 0:
        return
    d, rank = param.shape[0 if left else 1], low_rank.shape[0 if left else 1]
    with on_device_of(param):
        basis = _basis(d, rank, param.device, seed=seed, step=step, parameter=parameter, first=first)
    back_project_(param, low_rank, basis, alpha=alpha, beta=beta, left=left)
