"""Launch configurations: one named table per architecture, and the rule that splits a thin projection over the card.

A table maps (kernel, bits of the operands) to {largest rank: keyword arguments of the launch}. BLOCK_R is the tile along the
rank, BLOCK_C along the channels, BLOCK_D along the projected axis. bits is 16 if gradient (or update) and basis share a
16-bit type, else 32.
"""

import functools

import torch
import triton


def _tile(num_warps, num_stages, **blocks):
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


# Cards with at least 163 KiB of shared memory a block.
_LARGE = {
    ("project", 32): {
        16: _tile(4, 4, BLOCK_R=16, BLOCK_C=128, BLOCK_D=32),
        32: _tile(4, 4, BLOCK_R=32, BLOCK_C=128, BLOCK_D=32),
        64: _tile(8, 3, BLOCK_R=64, BLOCK_C=64, BLOCK_D=32),
        128: _tile(8, 3, BLOCK_R=128, BLOCK_C=64, BLOCK_D=32),
    },
    ("project", 16): {
        16: _tile(4, 4, BLOCK_R=16, BLOCK_C=128, BLOCK_D=64),
        32: _tile(4, 4, BLOCK_R=32, BLOCK_C=128, BLOCK_D=64),
        64: _tile(4, 4, BLOCK_R=64, BLOCK_C=64, BLOCK_D=64),
        128: _tile(8, 4, BLOCK_R=128, BLOCK_C=64, BLOCK_D=64),
    },
    ("back_project", 32): {
        16: _tile(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_R=16),
        128: _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_R=32),
    },
    ("back_project", 16): {
        16: _tile(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_R=16),
        128: _tile(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_R=64),
    },
}

# Cards with 99 KiB.
_SMALL = {
    **_LARGE,
    ("back_project", 32): {
        16: _tile(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_R=16),
        128: _tile(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_R=32),
    },
}

TABLES = {80: _LARGE, 86: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE, 120: _SMALL}

# Adam on an already projected gradient: elementwise but for the test of a channel.
ADAM = _tile(4, 1, BLOCK_R=64, BLOCK_C=32)


def operand_bits(a, b):
    """16 if the tensor cores multiply `a` and `b` in their own type, else 32."""
    return 16 if a == b and a != torch.float32 else 32


def config_for(arch, kernel, *, rank, bits):
    """Launch arguments of `kernel` on `arch` (80 is sm_80); an unlisted architecture uses the closest older table."""
    table = TABLES[max(known for known in TABLES if known <= max(arch, min(TABLES)))]
    by_rank = table[kernel, bits]
    return by_rank[min((limit for limit in by_rank if limit >= rank), default=max(by_rank))]


@functools.cache
def target(device):
    """(architecture, multiprocessors) of `device`; the interpreter plays a small card."""
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def max_split_tiles(multiprocessors):
    """Only fewer tiles than this are split, so that many counters serve any matrix."""
    return 2 * multiprocessors


def split(tiles, depth, *, block, rank, itemsize, multiprocessors):
    """(splits, depth of one) for `tiles` output tiles that each sum over `depth`.

    Two programs a multiprocessor fill the card; the fp32 partials, written and read once, stay under 25% of the gradient:
    splits * rank * 8 <= depth * itemsize / 4.
    """
    fill = triton.cdiv(max_split_tiles(multiprocessors), tiles)
    splits = max(1, min(fill, depth * itemsize // (32 * rank), triton.cdiv(depth, block)))
    chunk = max(1, triton.cdiv(triton.cdiv(depth, block), splits)) * block
    return max(1, triton.cdiv(depth, chunk)), chunk
