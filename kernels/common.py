"""What the kernels share: products, rounding at the store, and where a step's scalars lie."""

import contextlib

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels import configs

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Slots of a step's row of scalars (fp32, on the device). Rows are padded so that each starts on 16 bytes.
CORRECTION1, CORRECTION2, DECAY, ALPHA, GRAD_SCALE, ACTIVE = (tl.constexpr(i) for i in range(6))
SLOTS = tl.constexpr(8)


@triton.jit
def pick(matrices, i):
    """Entry i of a tuple of pointers, one a matrix of the launch."""
    p_matrix = matrices[0]
    for k in tl.static_range(1, len(matrices)):
        p_matrix = tl.where(i == k, matrices[k], p_matrix)
    return p_matrix


def one_each(tensors):
    """What a launch is given where it takes one tensor a matrix: one, or as many as it can serve, so that a kernel is compiled for
    two numbers of matrices. Those that fill it up are not looked at."""
    return tuple(tensors) if len(tensors) == 1 else (*tensors, *[tensors[-1]] * (configs.MOST - len(tensors)))


@triton.jit
def is_off(scalars):
    """Whether found_inf switched the step off."""
    return tl.load(scalars + ACTIVE) == 0


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """b_acc + b_a @ b_b in fp32. Operands of one 16-bit type are multiplied as they are, any other pair as fp32."""
    # The interpreter multiplies bf16 by its bit patterns; fp32 copies give it the same exact products.
    if b_a.dtype == b_b.dtype and b_a.dtype != tl.float32 and not INTERPRETED:
        return tl.dot(b_a, b_b, b_acc)
    return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision=PRECISION)


@triton.jit
def store(p_out, b_value, m_out):
    """Store fp32 values in the type of `p_out`, rounded to nearest even."""
    if p_out.dtype.element_ty == tl.bfloat16:
        # By hand, because the interpreter's own cast truncates.
        bits = b_value.to(tl.uint32, bitcast=True)
        bits = tl.where(b_value == b_value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        tl.store(p_out, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=m_out)
    else:
        tl.store(p_out, b_value.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def store_drawn(p_out, b_value, m_out, b_random):
    """Store fp32 values in 16 bits, rounded stochastically with 16 random bits each, to the bits of csrc/core/rounding.h."""
    b_bits = b_value.to(tl.uint32, bitcast=True)
    b_size, b_random = b_bits & 0x7FFFFFFF, b_random.to(tl.uint32)
    if p_out.dtype.element_ty == tl.bfloat16:
        b_nearest = tl.where(b_value == b_value, b_bits + 0x7FFF + ((b_bits >> 16) & 1), b_bits | 0x400000)
        b_drawn = tl.where(b_size <= 0x7F7F0000, b_bits + (0xFFFF - b_random), b_nearest)
        tl.store(p_out, (b_drawn >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=m_out)
    else:
        b_small = b_size < 0x38800000
        b_normal = (b_size - 0x38000000 + (0x1FFF - (b_random >> 3))) >> 13
        # Subnormal: in fixed point with 16 bits of fraction. Below 2²³ adding and taking away 2²³ rounds, beyond all are whole.
        b_fixed = tl.where(b_small, tl.abs(b_value), 0.0) * 1099511627776.0
        b_fixed = tl.where(b_fixed < 8388608.0, (b_fixed + 8388608.0) - 8388608.0, b_fixed).to(tl.int32).to(tl.uint32)
        b_drawn = tl.where(b_small, (b_fixed + (0xFFFF - b_random)) >> 16, b_normal) | ((b_bits >> 16) & 0x8000)
        b_nearest = b_value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        b_drawn = tl.where(b_size <= 0x477FE000, b_drawn, b_nearest)
        tl.store(p_out, b_drawn.to(tl.uint16).to(tl.float16, bitcast=True), mask=m_out)


def precision():
    """How fp32 products are taken: three tf32 products, or one where torch allows that."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def on_device_of(tensor):
    """Make the tensor's device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
