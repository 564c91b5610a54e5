"""Launch configurations: one table per architecture, and the rule that splits a thin projection over the card.

A table maps (kernel, kind) to {largest rank: keyword arguments of the launch}. BLOCK_R is the tile along the rank, BLOCK_C
along the channels, BLOCK_D along the projected axis. The kind is 16 if the two operands share a 16-bit type and nothing else
a tile holds is wider, else 32; "odd" if n or r is no multiple of 16: elements then move one by one, and a large tile spills.
"large" is for the same operands as 16: twice to four times as many channels a tile, whose rule runs on a piece at a time.
"""

import functools
from typing import NamedTuple

import torch
import triton

from lowrank_sys.kernels import roofline

# Of every launch. Sums are rounded as written; left alone, ptxas spills a few registers where that lets two programs share a
# multiprocessor.
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}


FP32 = torch.float32.itemsize
# A rule runs behind a product on all of a tile of at most this many sums; behind a larger one on a piece at a time, from scratch.
WHOLE = 128 * 64


def cdiv(a, b):
    """a / b, rounded up; on plain numbers, where Triton's own unwraps its arguments one by one."""
    return -(-a // b)


def _tile(num_warps, num_stages, **blocks):
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def _table(stages, large):
    return {
        ("project", "large"): {128: large},
        ("project", 32): {
            16: _tile(8, stages, BLOCK_R=16, BLOCK_C=128, BLOCK_D=32),
            32: _tile(4, stages, BLOCK_R=32, BLOCK_C=128, BLOCK_D=32),
            64: _tile(8, stages, BLOCK_R=64, BLOCK_C=128, BLOCK_D=32),
            128: _tile(8, stages, BLOCK_R=128, BLOCK_C=64, BLOCK_D=32),
        },
        ("project", 16): {
            16: _tile(4, stages, BLOCK_R=16, BLOCK_C=128, BLOCK_D=64),
            32: _tile(4, stages, BLOCK_R=32, BLOCK_C=128, BLOCK_D=64),
            64: _tile(8, stages, BLOCK_R=64, BLOCK_C=128, BLOCK_D=64),
            128: _tile(8, stages, BLOCK_R=128, BLOCK_C=64, BLOCK_D=64),
        },
        ("back_project", 32): {
            16: _tile(8, 1, BLOCK_M=128, BLOCK_N=64, BLOCK_R=16),
            128: _tile(8, stages, BLOCK_M=128, BLOCK_N=64, BLOCK_R=32),
        },
        ("back_project", 16): {
            16: _tile(8, 1, BLOCK_M=128, BLOCK_N=64, BLOCK_R=16),
            32: _tile(8, 1, BLOCK_M=128, BLOCK_N=64, BLOCK_R=32),
            128: _tile(8, stages, BLOCK_M=128, BLOCK_N=128, BLOCK_R=64),
        },
        ("project", "odd"): {
            16: _tile(4, 2, BLOCK_R=16, BLOCK_C=64, BLOCK_D=32),
            64: _tile(8, 2, BLOCK_R=64, BLOCK_C=32, BLOCK_D=32),
            128: _tile(8, 2, BLOCK_R=128, BLOCK_C=32, BLOCK_D=16),
        },
        ("back_project", "odd"): {128: _tile(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_R=16)},
    }


_WIDE = _tile(8, 3, BLOCK_R=128, BLOCK_C=128, BLOCK_D=64)
_LARGE = _table(stages=4, large=_WIDE)  # 163 KiB of shared memory a block, or more
_SMALL = _table(stages=3, large=_WIDE)  # 99 KiB
# wgmma keeps its operands in shared memory: 128 x 256 sums leave registers for the rest.
_HOPPER = _table(stages=4, large=_tile(8, 4, BLOCK_R=128, BLOCK_C=256, BLOCK_D=64))
# The tiles that cuBLAS is assumed to take.
LIBRARY = {"BLOCK_R": 128, "BLOCK_C": 256, "BLOCK_D": 64}

TABLES = {80: _LARGE, 86: _SMALL, 89: _SMALL, 90: _HOPPER, 100: _LARGE, 120: _SMALL}

# A Gaussian basis is made in groups of 64 rows.
GAUSSIAN_BASIS = _tile(4, 1, BLOCK_R=64)

# The update of weights with a residual, by the number of products (tiles hold the weight, the gradient and as many sums).
APPLY_RESIDUAL = {
    0: _tile(8, 1, BLOCK_M=32, BLOCK_N=128, BLOCK_R=16),
    1: _tile(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_R=32),
    2: _tile(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_R=16),
}

# A weight that is low-rank plus sparse, of any type. "odd" if n or r is no multiple of 16.
SCATTER_ADD = {"aligned": _tile(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_R=32), "odd": _tile(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_R=16)}

# Matrices of one shape that one launch serves at most.
MOST = 8

# The scalars of a step, a lane a matrix.
SCALARS = _tile(4, 1, BLOCK=128)

# A rule on R: elementwise but for the test and the sums of a channel.
RULE = _tile(4, 1, BLOCK_R=32, BLOCK_C=32)

# The linear layer on INT8 weights, by architecture, kind and number of rows: T along the rows of x, O along the outputs, D
# along the summed axis. A weight is dequantized once a tile of rows.
_INT8_LINEAR = {
    16: {128: _tile(8, 3, BLOCK_T=128, BLOCK_O=128, BLOCK_D=32)},
    32: {64: _tile(8, 3, BLOCK_T=64, BLOCK_O=128, BLOCK_D=16)},
    "odd": {64: _tile(4, 2, BLOCK_T=64, BLOCK_O=32, BLOCK_D=16)},
}
_INT8_LINEAR_90 = _INT8_LINEAR | {
    16: {64: _tile(8, 4, BLOCK_T=64, BLOCK_O=128, BLOCK_D=64), 256: _tile(8, 4, BLOCK_T=256, BLOCK_O=128, BLOCK_D=64)},
    32: {128: _tile(8, 3, BLOCK_T=128, BLOCK_O=128, BLOCK_D=16)},
}
_INT8_LINEAR_100 = _INT8_LINEAR_90 | {16: {128: _tile(8, 4, BLOCK_T=128, BLOCK_O=128, BLOCK_D=64)}}
INT8_LINEAR = {80: _INT8_LINEAR, 90: _INT8_LINEAR_90, 100: _INT8_LINEAR_100, 120: _INT8_LINEAR}

# The update of INT8 weights, by kind: a tile of whole groups along n, and as many rows as leave this many elements. Residuals take
# the tiles of odd sizes, which leave room for the gradient and a second sum.
APPLY_INT8 = {
    16: _tile(8, 2, ELEMENTS=8192, BLOCK_R=64),
    32: _tile(8, 2, ELEMENTS=8192, BLOCK_R=32),
    "odd": _tile(8, 1, ELEMENTS=4096, BLOCK_R=16),
}

# Products in INT8: a tile holds whole groups of 256. "odd" if m, n or r is no multiple of 16.
QUANTIZE_INT8 = _tile(4, 1, BLOCK_C=32)
PROJECT_INT8 = {"aligned": _tile(8, 1, BLOCK_R=128, BLOCK_C=32), "odd": _tile(8, 1, BLOCK_R=16, BLOCK_C=16)}
BACK_PROJECT_INT8_GEMM = _tile(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_D=64)


class Target(NamedTuple):
    """A card: its architecture (80 is sm_80) and its number of multiprocessors."""

    arch: int
    multiprocessors: int

    @property
    def counters(self):
        """Only fewer tiles than this are split, so that many counters serve any matrix."""
        return 2 * self.multiprocessors


def together(m, n, card):
    """How many matrices (m, n) share a launch: many where one is too small to fill the card."""
    tiles = cdiv(m, 128) * cdiv(n, 128)
    return MOST if tiles < card.counters else 1


class Plan(NamedTuple):
    """How a product is launched: its grid is (tiles, splits), each split sums over `chunk` of the summed axis. parts: how many fp32
    copies of the result there are in scratch; config None: it is cuBLAS's."""

    config: dict | None
    tiles: int
    splits: int
    chunk: int
    parts: int = 0
    seconds: float = 0.0  # computed

    @property
    def fused(self):
        """Whether a rule runs behind the product in the same launch, else in one of its own."""
        return self.config is not None


@functools.cache
def target(device):
    """The card behind `device`; the interpreter plays a small one."""
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return Target(80, 4)
    properties = torch.cuda.get_device_properties(device)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def of_arch(tables, arch):
    """The table of `arch`, or of the next older architecture that is listed."""
    return tables[max((known for known in tables if known <= arch), default=min(tables))]


def of_size(by_limit, size):
    """The entry of the least limit that is not below `size`, or of the largest."""
    return by_limit[min((limit for limit in by_limit if limit >= size), default=max(by_limit))]


@functools.cache
def config_for(arch, kernel, *, n, r, dtypes):
    """Launch arguments of `kernel` on `arch` for W (m, n) and rank r; an unlisted architecture uses the next older table.

    dtypes: the two operands', then the weight's if there is one.
    """
    table = of_arch(TABLES, arch)
    return of_size(table[kernel, kind_of(n, r, dtypes)], r)


def int8_linear_tile(config, *, back, group_size, nf4):
    """An entry of INT8_LINEAR, its tile in one group along n; forward, a deeper one leaves no registers to decode NF4 in."""
    axis = "BLOCK_O" if back else "BLOCK_D"
    most = min(group_size, 32) if nf4 and not back else group_size
    return config | {axis: min(config[axis], most)}


@functools.cache
def plan_int8_linear(t, m, n, *, back, dtype, group_size, card, nf4=False):
    """Plan of the linear layer on INT8 or NF4 weights for t rows.

    The number of parts is the one of which the card takes the least time, in entries of the summed axis: those of a part, times
    the waves, and what its fp32 sums cost, 128 to store and 128 a part to add. There are at most 8, and two programs a
    multiprocessor.
    """
    kind = "odd" if m % 16 or n % 16 else 8 * dtype.itemsize
    config = int8_linear_tile(of_size(of_arch(INT8_LINEAR, card.arch)[kind], t), back=back, group_size=group_size, nf4=nf4)
    outputs, depth = (n, m) if back else (m, n)
    tiles = cdiv(t, config["BLOCK_T"]) * cdiv(outputs, config["BLOCK_O"])

    def cost(splits):
        return cdiv(tiles * splits, card.multiprocessors) * (depth / splits + (128 + 128 * splits if splits > 1 else 0))

    blocks = max(1, cdiv(depth, config["BLOCK_D"]))
    splits = min(range(1, max(1, min(8, blocks, card.counters // max(1, tiles))) + 1), key=cost)
    chunk = cdiv(blocks, splits)
    return Plan(config, tiles, cdiv(blocks, chunk), chunk * config["BLOCK_D"])


def kind_of(n, r, dtypes, offset=0):
    """The kind of a product, see above; rows of an INT8 weight that share no draws of random bits count as odd."""
    narrow = dtypes[0] == dtypes[1] and all(dtype.itemsize == 2 for dtype in dtypes)
    return "odd" if n % 16 or r % 16 or offset % 8 else 16 if narrow else 32


def scatter_add(n, r):
    """Launch arguments of W = scale B A + S for W (m, n) and rank r."""
    return SCATTER_ADD["odd" if n % 16 or r % 16 else "aligned"]


@functools.cache
def apply(arch, *, products, residual, n, r, dtypes, group_size=0, offset=0):
    """Launch arguments of the update of W (m, n) with X of rank r: `products` with the basis, with a `residual` or without.

    dtypes: X's and the basis', then the weight's. An INT8 weight, in groups of group_size, begins at element `offset` of the
    unsharded tensor.
    """
    if group_size:
        return apply_int8(APPLY_INT8["odd" if residual else kind_of(n, r, dtypes[:2], offset)], r, group_size)
    if not residual:
        return config_for(arch, "back_project", n=n, r=r, dtypes=dtypes)
    config = APPLY_RESIDUAL[products]
    return config if r > 16 else config | {"BLOCK_R": 16}


def apply_int8(config, r, group_size):
    """Launch arguments of an entry of APPLY_INT8; a product's tile has 16 rows or more."""
    wide = max(128, group_size)
    high = config["ELEMENTS"] // wide
    if not r:
        return _tile(config["num_warps"], 1, BLOCK_M=high, BLOCK_N=wide, BLOCK_R=16)
    # The widest tiles leave shared memory for a shallow part of the other operand, once.
    deep = min(config["BLOCK_R"], max(16, triton.next_power_of_2(r)), max(16, 8192 // wide))
    stages = config["num_stages"] if wide < 1024 else 1
    return _tile(config["num_warps"], stages, BLOCK_M=max(16, high), BLOCK_N=wide, BLOCK_R=deep)


@functools.cache
def plan_project(m, n, r, *, left, dtypes, card, adam=False, squares=False, int4=False, library=False):
    """Plan of R = project(G) for G (m, n) and B of `dtypes`, of least computed time.

    adam: X is stored, not R; squares: with the sums of squares of G's channels; int4: B is codes, in G's type; library: cuBLAS may
    take the product. See docs/kernels/projection.md for what is compared.
    """
    channels, depth = (n, m) if left else (m, n)
    narrow = dtypes[0] == dtypes[1] and dtypes[0].itemsize == 2
    whole = narrow and not int4 and n % 16 == 0 and r % 16 == 0
    grad, result = m * n * dtypes[0].itemsize, r * channels * FP32
    basis = depth * r * (0.5 if int4 else dtypes[1].itemsize)
    # R is in registers, or in the cache behind the product: both moments twice, X once.
    rule = roofline.memory(card, 4 * result + r * channels * dtypes[1].itemsize) if adam else 0.0

    # Partial sums are few beside G, or stay in the L2 cache until they are added; small matrices fill the card together.
    room = max(grad // 8, (of_arch(roofline.FIGURES, card.arch).cache << 20) // 2 if together(m, n, card) == 1 else 0)

    def plan(config, splits, fused=True):
        tiles_r, tiles_c = cdiv(r, config["BLOCK_R"]), cdiv(channels, config["BLOCK_C"])
        blocks = max(1, cdiv(depth, config["BLOCK_D"]))
        chunk = cdiv(blocks, splits)
        splits = cdiv(blocks, chunk)
        aside = adam and fused and config["BLOCK_R"] * config["BLOCK_C"] > WHOLE
        parts = splits if splits > 1 or aside else 0
        # From sm_90 on two tiles of cuBLAS's along the rank share what they read of G.
        times = tiles_r if fused or card.arch < 90 else cdiv(tiles_r, 2)
        stored = parts + (not (adam and fused))
        work = roofline.Work(
            flop=2 * m * n * r,
            cached=times * grad + tiles_c * basis + 2 * parts * result,
            moved=grad + basis + stored * result,
            programs=max(1, tiles_r * tiles_c * splits),
        )
        taken = roofline.seconds(card, work, narrow=narrow) + rule
        if adam and not fused:
            taken += roofline.BOUNDARY + roofline.memory(card, result)
        return Plan(config if fused else None, tiles_r * tiles_c, splits, chunk * config["BLOCK_D"], parts if fused else 0, taken)

    def split(config, **how):
        """Every number of splits that is worth a thought."""
        tiles = cdiv(channels, config["BLOCK_C"]) * cdiv(r, config["BLOCK_R"])
        most = max(1, min(cdiv(card.counters, max(1, tiles)), cdiv(depth, config["BLOCK_D"])))
        return [plan(config, splits, **how) for splits in range(1, most + 1) if splits == 1 or splits * result <= room]

    plans = split(config_for(card.arch, "project", n=n, r=r, dtypes=dtypes))
    if whole and r >= 128:
        plans += split(of_arch(TABLES, card.arch)["project", "large"][128])
    best = min(plans, key=lambda plan: plan.seconds)
    if library and whole and not squares and together(m, n, card) == 1:
        other = min(split(LIBRARY, fused=False), key=lambda plan: plan.seconds)
        # What the model cannot tell apart stays in one launch.
        best = other if other.seconds < 0.9 * best.seconds else best
    return best


def quantize_int8(depth):
    """Launch arguments of the quantisation of an operand: a program sees a whole group, or all of a shorter depth."""
    return QUANTIZE_INT8 | {"BLOCK_D": min(256, max(16, triton.next_power_of_2(depth)))}


@functools.cache
def plan_project_int8(m, n, r, *, left, dtype, card):
    """Plan of R = project(G) in INT8: split as `plan_project`, in whole groups."""
    config = PROJECT_INT8["odd" if m % 16 or n % 16 or r % 16 else "aligned"]
    channels, depth = (n, m) if left else (m, n)
    return _split(config, channels, depth, r, 256, dtype, card)


def _split(config, channels, depth, r, block, dtype, card):
    """Plan that sums over `depth` entries in blocks."""
    tiles = cdiv(channels, config["BLOCK_C"]) * cdiv(r, config["BLOCK_R"])
    blocks = max(1, cdiv(depth, block))
    fill = cdiv(card.counters, max(1, tiles))
    splits = max(1, min(fill, blocks, depth * dtype.itemsize // (32 * r)))
    chunk = cdiv(blocks, splits)
    return Plan(config, tiles, cdiv(blocks, chunk), chunk * block)
