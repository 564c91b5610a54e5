"""Bytes a launch moves, tensor by tensor: what the kernels' loads and stores add up to, and the least any kernel must move."""

from typing import NamedTuple

import torch
import triton

from lowrank_sys.kernels import configs

FP32 = torch.float32.itemsize


class Bytes(NamedTuple):
    loaded: int
    stored: int


class Int4(NamedTuple):
    """A basis in INT4, where a type is asked for."""

    group_size: int = 256

    @property
    def dtype(self):
        """What an entry is where each is made first."""
        return torch.float32


def _type(basis):
    return basis.dtype if isinstance(basis, Int4) else basis


def _basis(basis, d, r, times, tile):
    """A basis (d, r) that is read `times` times in tiles of `tile` entries of a vector. basis: a type or `Int4`."""
    if not isinstance(basis, Int4):
        return {"basis": Bytes(times * d * r * basis.itemsize, 0)}
    scales = Bytes(times * r * triton.cdiv(d, min(tile, basis.group_size)) * FP32, 0)
    return {"basis": Bytes(times * r * triton.cdiv(d, 2), 0), "scale": scales, "offset": scales}


def project(m, n, r, *, left, grad, basis, card, out=torch.float32, moments=False, squares=False):
    """R = project(G); the moments of an Adam epilogue if `moments`. grad, basis, out are types; basis may be `Int4`.

    Where cuBLAS takes the product, what it must move, and the launch of Adam behind it.
    """
    plan = plan_project(m, n, r, left=left, grad=grad, basis=basis, card=card, out=out, moments=moments, squares=squares)
    channels, depth = (n, m) if left else (m, n)
    size = r * channels
    if not plan.fused:
        rows = {"grad": Bytes(m * n * grad.itemsize, 0), **_basis(basis, depth, r, 1, depth), "partials": Bytes(0, 0)}
        return (
            rows | {"out": Bytes(0, size * FP32)}
            if not moments
            else _sum(rows | {"low_rank_grad": Bytes(0, size * FP32)}, adam(m, n, r, left=left, out=out))
        )
    parts = plan.parts * size * FP32
    times = triton.cdiv(channels, plan.config["BLOCK_C"])
    rows = {
        "grad": Bytes(triton.cdiv(r, plan.config["BLOCK_R"]) * m * n * grad.itemsize, 0),
        **_basis(basis, depth, r, times, plan.config["BLOCK_D"]),
        "partials": Bytes(parts, parts),
        "out": Bytes(0, size * out.itemsize),
    }
    if isinstance(basis, Int4) and grad.itemsize == 2:
        # Codes are multiplied as they are: scales and offsets come in once a group and part.
        ends = [(i * plan.chunk, min((i + 1) * plan.chunk, depth)) for i in range(plan.splits)]
        groups = sum(triton.cdiv(end, basis.group_size) - begin // basis.group_size for begin, end in ends)
        rows["scale"] = rows["offset"] = Bytes(times * r * groups * FP32, 0)
    if moments:
        rows |= {name: Bytes(size * FP32, size * FP32) for name in ("exp_avg", "exp_avg_sq")}
    return rows


def plan_project(m, n, r, *, left, grad, basis, card, out=torch.float32, moments=False, squares=False):
    """The plan of `launch_project` by types; basis may be `Int4`, whose codes take the gradient's type."""
    int4 = isinstance(basis, Int4)
    return configs.plan_project(
        m,
        n,
        r,
        left=left,
        dtypes=(grad, grad if int4 else basis),
        card=card,
        adam=moments,
        squares=squares,
        int4=int4,
        library=moments or out == torch.float32,
    )


def back_project(m, n, r, *, left, param, low_rank, basis, card):
    """W <- decay W + alpha back(X). param, low_rank, basis are types; basis may be `Int4`."""
    config = configs.config_for(card.arch, "back_project", n=n, r=r, dtypes=(low_rank, _type(basis), param))
    rows_of_tiles, columns_of_tiles = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    d, times, tile = (m, columns_of_tiles, config["BLOCK_M"]) if left else (n, rows_of_tiles, config["BLOCK_N"])
    other, again = (n, rows_of_tiles) if left else (m, columns_of_tiles)
    return {
        "param": Bytes(m * n * param.itemsize, m * n * param.itemsize),
        **_basis(basis, d, r, times, tile),
        "low_rank": Bytes(again * other * r * low_rank.itemsize, 0),
    }


def quantize_int8(channels, depth, *, dtype):
    """An operand of a product in INT8."""
    scales = channels * triton.cdiv(depth, 256) * FP32
    return {"x": Bytes(channels * depth * dtype.itemsize, 0), "codes": Bytes(0, channels * depth), "scale": Bytes(0, scales)}


def project_int8(m, n, r, *, left, grad, card, moments=False):
    """R = project(G) in INT8, the basis already quantised. grad is a type."""
    plan = configs.plan_project_int8(m, n, r, left=left, dtype=grad, card=card)
    channels, depth = (n, m) if left else (m, n)
    times, size = triton.cdiv(channels, plan.config["BLOCK_C"]), r * channels * FP32
    parts = plan.splits * size if plan.splits > 1 else 0
    rows = {
        "grad": Bytes(triton.cdiv(r, plan.config["BLOCK_R"]) * m * n * grad.itemsize, 0),
        "codes": Bytes(times * r * depth, 0),
        "scale": Bytes(times * r * triton.cdiv(depth, 256) * FP32, 0),
        "partials": Bytes(parts, parts),
        "out": Bytes(0, size),
    }
    return rows | ({name: Bytes(size, size) for name in ("exp_avg", "exp_avg_sq")} if moments else {})


def back_project_int8_gemm(m, n, r, *, param):
    """W <- decay W + alpha back(X) in INT8, both operands already quantised. param is a type."""
    config, groups = configs.BACK_PROJECT_INT8_GEMM, triton.cdiv(r, 256) * FP32
    across, down = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(m, config["BLOCK_M"])
    return {
        "param": Bytes(m * n * param.itemsize, m * n * param.itemsize),
        "rows": Bytes(across * m * r, 0),
        "row_scale": Bytes(across * m * groups, 0),
        "columns": Bytes(down * n * r, 0),
        "column_scale": Bytes(down * n * groups, 0),
    }


def adam(m, n, r, *, left, out):
    """X = Adam(R) on an already projected gradient: R is tested, then used."""
    size = r * (n if left else m)
    rows = {"low_rank_grad": Bytes(2 * size * FP32, 0), "out": Bytes(0, size * out.itemsize)}
    return rows | {name: Bytes(size * FP32, size * FP32) for name in ("exp_avg", "exp_avg_sq")}


def _sum(*launches):
    total = {}
    for rows in launches:
        for name, (loaded, stored) in rows.items():
            before = total.get(name, Bytes(0, 0))
            total[name] = Bytes(before.loaded + loaded, before.stored + stored)
    return total


def _and_apply(first, m, n, r, *, left, param, basis, card):
    second = back_project(m, n, r, left=left, param=param, low_rank=basis, basis=basis, card=card)
    first["update"] = first.pop("out")
    second["update"] = second.pop("low_rank")
    return _sum(first, second)


def scalars(matrices, *, step, rate, draws=False):
    """The scalars of a step; step and rate are types. The rate is read once a block of matrices."""
    blocks = triton.cdiv(matrices, configs.SCALARS["BLOCK"])
    return {
        "steps": Bytes(matrices * step.itemsize, 0),
        "lr": Bytes(blocks * rate.itemsize, 0),
        "rows": Bytes(0, matrices * 6 * FP32),
        "draws": Bytes(0, matrices * torch.int64.itemsize if draws else 0),
    }


def galore_step(m, n, r, *, left, param, grad, basis, card):
    """Both kernels of a step. W and G are the only full-sized tensors: W once each way, G once per tile of r."""
    first = project(m, n, r, left=left, grad=grad, basis=basis, card=card, out=basis, moments=True)
    return _and_apply(first, m, n, r, left=left, param=param, basis=basis, card=card)


def subspace_step(m, n, r, *, left, param, basis, card):
    """Both kernels of a step from R."""
    return _and_apply(adam(m, n, r, left=left, out=basis), m, n, r, left=left, param=param, basis=basis, card=card)


def int8_linear(t, m, n, *, back, dtype, group_size, card, bias=None):
    """y (t, m) = x Wᵀ + bias, or dx (t, n) = dy W if `back`: the type of x or dy, and of the bias."""
    plan = configs.plan_int8_linear(t, m, n, back=back, dtype=dtype, group_size=group_size, card=card)
    depth, outputs = (m, n) if back else (n, m)
    tall, wide, deep = (triton.cdiv(size, plan.config[f"BLOCK_{axis}"]) for size, axis in ((t, "T"), (outputs, "O"), (depth, "D")))
    parts = plan.splits * t * outputs * FP32 if plan.splits > 1 else 0
    # The bias is added to 16 rows at a time where parts are summed.
    biases = triton.cdiv(t, plan.config["BLOCK_T"]) * (plan.config["BLOCK_T"] // 16 if parts else 1)
    return {
        "rows": Bytes(wide * t * depth * dtype.itemsize, 0),
        "codes": Bytes(tall * m * n, 0),
        "scale": Bytes(tall * (wide * m if back else deep * m) * FP32, 0),
        "bias": Bytes(biases * m * bias.itemsize if bias else 0, 0),
        "partials": Bytes(parts, parts),
        "out": Bytes(0, t * outputs * dtype.itemsize),
    }


def gaussian_basis(d, r, *, out=torch.float32, key=False):
    """Rows of a Gaussian basis, written once; its `key`, if it lies on the device, is read by every program."""
    programs = triton.cdiv(d + 63, 64) * triton.cdiv(r, configs.GAUSSIAN_BASIS["BLOCK_R"])
    return {"out": Bytes(0, d * r * out.itemsize), "key": Bytes(programs * 4 * torch.int64.itemsize if key else 0, 0)}


def gaussian_project(m, n, r, *, left, grad, card):
    """The launches of R = project(G) on a basis from its seed: it is made, then read."""
    basis = gaussian_basis(m if left else n, r)
    return basis, project(m, n, r, left=left, grad=grad, basis=torch.float32, card=card)


def gaussian_back_project(m, n, r, *, left, param, card):
    """The launches of W <- beta W + alpha back(X) on a basis from its seed: it is made, then read."""
    types = {"param": param, "low_rank": torch.float32, "basis": torch.float32}
    return gaussian_basis(m if left else n, r), back_project(m, n, r, left=left, card=card, **types)


def ratio(m, n, r, *, left, splits=0, out=False, gram=False):
    """Moments of R and the sums of its channels; `splits` parts of the squares of G's, N if `out`, (BᵀB)R if `gram`."""
    channels = n if left else m
    size = r * channels * FP32
    return {
        "low_rank_grad": Bytes(2 * size, 0),
        "gram_grad": Bytes(size if gram and splits else 0, 0),
        "out": Bytes(0, size if out else 0),
        "exp_avg": Bytes(size, size),
        "exp_avg_sq": Bytes(size, size),
        "squares": Bytes(splits * channels * FP32, 0),
        "sums": Bytes(0, (3 if splits else 2) * channels * FP32),
    }


def coefficients(channels, *, per_tensor, limited):
    """The factor of each channel, from its sums; all are multiplied by what they share, which the limiter may leave at 1."""
    programs = triton.cdiv(channels, configs.COEFFICIENT["BLOCK"])
    size, parts = channels * FP32, (2 * per_tensor + limited) * programs * torch.float64.itemsize
    shared = size if per_tensor or limited else 0
    return {
        "sums": Bytes((2 + limited) * size, 0),
        "coefficients": Bytes(shared, size + shared),
        "norms": Bytes(parts, parts),
        "limiter": Bytes(FP32, FP32) if limited else Bytes(0, 0),
    }


def residual(m, n, r, *, left, rule, param, grad, basis=None, scaled=True):
    """W <- decay W + alpha update: G once, W once each way. rule: 0 without a product, 1 with one, 2 with two; scaled: with a
    factor for each channel."""
    config = configs.residual_config(rule, r if rule else 0)
    rows_of_tiles, columns_of_tiles = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    d, times = (m, columns_of_tiles) if left else (n, rows_of_tiles)
    other, again = (n, rows_of_tiles) if left else (m, columns_of_tiles)
    low_rank = Bytes(again * other * r * FP32 if rule else 0, 0)
    return {
        "param": Bytes(m * n * param.itemsize, m * n * param.itemsize),
        "grad": Bytes(m * n * grad.itemsize, 0),
        "coefficients": Bytes(again * other * FP32 if scaled else 0, 0),
        "basis": Bytes(times * d * r * basis.itemsize if rule else 0, 0),
        "low_rank": low_rank,
        "low_rank_grad": low_rank,
    }


def _projected(m, n, r, *, left, grad, basis, card, limited):
    """The launches of R = project(G), and how many parts the squares of G's channels have; basis None: a Gaussian one."""
    made = () if basis else (gaussian_basis(m if left else n, r, key=True),)
    basis = basis or torch.float32
    kind = {"left": left, "grad": grad, "basis": basis, "card": card, "squares": limited}
    first = project(m, n, r, **kind)
    splits = plan_project(m, n, r, **kind).splits if limited else 0
    first["squares"] = Bytes(0, splits * (n if left else m) * FP32)
    return *made, first, splits


def apollo_step(m, n, r, *, left, param, grad, basis, card, per_tensor=False, limited=True):
    """The launches of a step, in order. basis: its type, or None for a Gaussian one."""
    *first, splits = _projected(m, n, r, left=left, grad=grad, basis=basis, card=card, limited=limited)
    return (
        *first,
        ratio(m, n, r, left=left, splits=splits),
        coefficients(n if left else m, per_tensor=per_tensor, limited=limited),
        residual(m, n, r, left=left, rule=0, param=param, grad=grad),
    )


def fira_step(m, n, r, *, left, param, grad, basis, card, gram=False):
    """The launches of a step, in order; `gram`: with BᵀB, which costs a product with R."""
    *first, splits = _projected(m, n, r, left=left, grad=grad, basis=basis, card=card, limited=True)
    # R (r, n) is projected by the symmetric BᵀB as G is by B.
    rows, columns = (r, n) if left else (m, r)
    inside = (project(rows, columns, r, left=left, grad=torch.float32, basis=torch.float32, card=card),) if gram else ()
    return (
        *first,
        *inside,
        ratio(m, n, r, left=left, splits=splits, out=True, gram=gram),
        coefficients(n if left else m, per_tensor=False, limited=True),
        residual(m, n, r, left=left, rule=1, param=param, grad=grad, basis=basis),
    )


def frugal_step(m, n, r, *, left, param, grad, basis, card, sign=True):
    """The launches of a step, in order."""
    return (
        project(m, n, r, left=left, grad=grad, basis=basis, card=card),
        adam(m, n, r, left=left, out=torch.float32),
        residual(m, n, r, left=left, rule=2 if sign else 1, param=param, grad=grad, basis=basis, scaled=False),
    )


def _int8(m, n, group_size):
    """Codes and scales of a weight that is updated in place."""
    scales = m * triton.cdiv(n, group_size) * FP32
    return {"codes": Bytes(m * n, m * n), "weight_scale": Bytes(scales, scales)}


def back_project_int8(m, n, r, *, left, low_rank, basis, group_size):
    """W <- decay W + alpha back(X) for an INT8 weight. low_rank and basis are types; basis may be `Int4`."""
    config = configs.back_project_int8(n=n, r=r, dtypes=(low_rank, _type(basis)), group_size=group_size)
    rows_of_tiles, columns_of_tiles = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    d, times, tile = (m, columns_of_tiles, config["BLOCK_M"]) if left else (n, rows_of_tiles, config["BLOCK_N"])
    other, again = (n, rows_of_tiles) if left else (m, columns_of_tiles)
    return {
        **_int8(m, n, group_size),
        **_basis(basis, d, r, times, tile),
        "low_rank": Bytes(again * other * r * low_rank.itemsize, 0),
    }


def scaled_int8(m, n, *, left, grad, group_size):
    """APOLLO's W <- decay W + alpha c o G for an INT8 weight."""
    config = configs.scaled_int8(group_size)
    times = triton.cdiv(m, config["BLOCK_M"]) * n if left else triton.cdiv(n, config["BLOCK_N"]) * m
    return {**_int8(m, n, group_size), "grad": Bytes(m * n * grad.itemsize, 0), "coefficients": Bytes(times * FP32, 0)}


def compulsory(m, n, r, *, left, param, grad, basis):
    """Bytes a step moves if every tensor is read once and written once, as the L2 cache allows: G, 2 W, B, 4 moments."""
    channels, depth = (n, m) if left else (m, n)
    return m * n * (grad.itemsize + 2 * param.itemsize) + depth * r * basis.itemsize + 4 * channels * r * FP32
