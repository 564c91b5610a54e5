"""Scratch memory inside the ops, in bytes: what a step allocates and frees again, and no tensor outside shows.

A formula stands next to the op that it is about, takes the op's own arguments and says how much is held at once; the planner
(lowrank_sys.memory) adds it to the tensors that are alive while the op runs. Compositions and the oracle need none: they are
run op by op. An op without a formula is bounded by `bound`: the house rule allows it fp32 copies of its small operands and one
tile, and no matrix of the weight's size.
"""

import torch

# csrc/ops/cpu/tensors.h: other storage than fp32 passes through fp32 in tiles of at most 1024 rows and 4 MiB.
TILE_SIDE, TILE_ELEMENTS = 1024, 1 << 20
# Two programs a multiprocessor of a large card: matrices of fewer tiles share a launch, up to 8 at once.
FULL_CARD, SHARED_LAUNCH = 2 * 148, 8
# Of the L2 cache of such a card.
HALF_CACHE = 63 << 20

FORMULAS = {}


def workspace(*names):
    """Decorator: the function gives the bytes of scratch of these ops on the CPU, or with `cuda=True` on a GPU."""

    def add(function):
        FORMULAS.update(dict.fromkeys(names, function))
        return function

    return add


def fp32(*shape):
    """Bytes of an fp32 tensor."""
    elements = 4
    for size in shape:
        elements *= size
    return elements


def tile_shape(m, n):
    """The tile that a matrix (m, n) passes through."""
    high = min(m, TILE_SIDE)
    return high, min(n, TILE_ELEMENTS // max(1, high))


def tile(m, n):
    """Bytes of the tile that a matrix (m, n) passes through."""
    return fp32(*tile_shape(m, n))


def int8_tile_shape(m, n):
    """The tile that an update of an INT8 weight (m, n) passes through: it ends with a group (csrc/ops/cpu/apply.cpp)."""
    high = min(m, TILE_SIDE)
    return high, min(n, TILE_ELEMENTS // max(1, high) // 1024 * 1024)


def int4_panel(d, r):
    """Bytes of the part of an INT4 basis (d, r) that is unpacked at once: 256 KiB a thread (csrc/ops/cpu/int4_products.cpp)."""
    vectors = min(r, 256)
    return fp32(vectors, min((256 << 10) // 4 * torch.get_num_threads() // vectors, max(1, d)))


def int4_panel_of(matrix, r, left):
    """`int4_panel` for a product with `matrix`, which passes through tiles unless it is fp32."""
    sides = matrix.shape if matrix.dtype == torch.float32 else tile_shape(*matrix.shape)
    return int4_panel(sides[0 if left else 1], r) if matrix.numel() else 0


def int8_operand(channels, depth):
    """Bytes of an operand (channels, depth) in INT8, scales and sums of codes with it (csrc/ops/cpu/int8_gemm.cpp)."""
    return -(-channels // 64) * 64 * -(-depth // 256) * (min(256, (depth + 3) // 4 * 4) + 8)


def int8_panels(r):
    """Most bytes that the threads of a product of rank r in INT8 hold: a part of G and of R each (csrc/cpu/int8_gemm.cpp)."""
    high = -(-r // 4) * 4
    wide = max(1, min(8, (1 << 16) // high // 64)) * 64
    return torch.get_num_threads() * wide * (4 * high + 5 * 256)


def tile_unless_fp32(matrix):
    return 0 if matrix.dtype == torch.float32 else tile(*matrix.shape)


def copy_unless_fp32(tensor):
    return 0 if tensor.dtype == torch.float32 else fp32(*tensor.shape)


def reused(needs):
    """Most bytes held when memory is kept from one matrix to the next and replaced where it is too small."""
    have = most = 0
    for need in needs:
        if need > have:
            most, have = max(most, have + need), need
    return most


def launched_together(m, n):
    """How many matrices (m, n) a launch on a GPU serves at most."""
    return SHARED_LAUNCH if -(-m // 128) * -(-n // 128) < FULL_CARD else 1


def split_parts(gradient, size):
    """Most bytes of R, of `size` elements, and of its parts that a launch of projections like this holds in scratch on a GPU.

    Parts are an eighth of each gradient; for one that fills its card by itself as many as fill it with tiles of 256 x 128, in half
    of its L2 cache (kernels/configs.py).
    """
    m, n = gradient.shape
    few = max(gradient.numel() * gradient.element_size() // 8, 4 * size)
    alone = fp32(min(FULL_CARD, -(-m // 128) * -(-n // 128)), 256, 128) + 4 * size
    return max(launched_together(m, n) * few, min(HALF_CACHE, alone))


def bound(*args, **kwargs):
    """For an op without a formula: of its largest matrix, fp32 copies of all operands but those of the weight's size."""
    operands = [*args, *kwargs.values()]
    lists = [o for o in operands if isinstance(o, (list, tuple)) and o and isinstance(o[0], torch.Tensor)]
    matrices = list(zip(*lists)) or [[o for o in operands if isinstance(o, torch.Tensor)]]
    most = 0
    for tensors in matrices:
        sizes = [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
        full = max(sizes, default=0)
        most = max(most, 4 * sum(size for size in sizes if size < full) + 4 * min(full, TILE_ELEMENTS))
    return most
