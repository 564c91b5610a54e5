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


class Int8(NamedTuple):
    """A weight in INT8, where a type is asked for."""

    group_size: int = 256


def _type(basis):
    return basis.dtype if isinstance(basis, Int4) else basis


def _basis(basis, d, r, times, tile):
    """A basis (d, r) that is read `times` times in tiles of `tile` entries of a vector. basis: a type or `Int4`."""
    if not isinstance(basis, Int4):
        return {"basis": Bytes(times * d * r * basis.itemsize, 0)}
    scales = Bytes(times * r * triton.cdiv(d, min(tile, basis.group_size)) * FP32, 0)
    return {"basis": Bytes(times * r * triton.cdiv(d, 2), 0), "scale": scales, "offset": scales}


def _sum(*launches):
    total = {}
    for rows in launches:
        for name, (loaded, stored) in rows.items():
            before = total.get(name, Bytes(0, 0))
            total[name] = Bytes(before.loaded + loaded, before.stored + stored)
    return total


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
            else _sum(rows | {"low_rank_grad": Bytes(0, size * FP32)}, rule(m, n, r, left=left, out=out))
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


def _weight(m, n, weight):
    """A weight, or its codes and scales, updated in place. weight: a type or `Int8`."""
    if not isinstance(weight, Int8):
        return {"weight": Bytes(m * n * weight.itemsize, m * n * weight.itemsize)}
    scales = m * triton.cdiv(n, weight.group_size) * FP32
    return {"weight": Bytes(m * n, m * n), "weight_scale": Bytes(scales, scales)}


def apply(m, n, r, *, left, weight, card, low_rank=None, basis=None, grad=None, sign=False, coefficients=False):
    """W <- decay W + alpha (back(X) + phi). weight, low_rank, basis and grad are types, None where an argument is: without low_rank
    there is no product, with grad there is a residual, or its `sign`. weight may be `Int8`, basis `Int4`."""
    int8 = isinstance(weight, Int8)
    config = configs.apply(
        card.arch,
        products=0 if low_rank is None else 1 + sign,
        residual=grad is not None,
        n=n,
        r=r if low_rank else 0,
        dtypes=((low_rank, _type(basis)) if low_rank else ()) + (torch.int8 if int8 else weight,),
        group_size=weight.group_size if int8 else 0,
    )
    rows_of_tiles, columns_of_tiles = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    d, times, tile = (m, columns_of_tiles, config["BLOCK_M"]) if left else (n, rows_of_tiles, config["BLOCK_N"])
    other, again = (n, rows_of_tiles) if left else (m, columns_of_tiles)
    rows = _weight(m, n, weight)
    if grad is not None:
        rows["grad"] = Bytes(m * n * grad.itemsize, 0)
    if coefficients:
        rows["coefficients"] = Bytes(again * other * FP32, 0)
    if low_rank is not None:
        rows |= _basis(basis, d, r, times, tile)
        rows["low_rank"] = Bytes(again * other * r * low_rank.itemsize, 0)
        rows["low_rank_grad"] = Bytes(again * other * r * FP32 if grad is not None else 0, 0)
    return rows


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


def rule(m, n, r, *, left, out=None, splits=0, gram=False):
    """A step of fp32 moments from R: the type of X, or of N if it is stored. A ratio has `splits` parts of the squares of G's
    channels, and (BᵀB)R if `gram`."""
    channels = n if left else m
    size = r * channels
    return {
        "low_rank_grad": Bytes(2 * size * FP32, 0),
        "gram_grad": Bytes(size * FP32 if gram and splits else 0, 0),
        "out": Bytes(0, size * out.itemsize if out else 0),
        "exp_avg": Bytes(size * FP32, size * FP32),
        "exp_avg_sq": Bytes(size * FP32, size * FP32),
        "squares": Bytes(splits * channels * FP32, 0),
    }


def sums(m, n, r, *, left, before, limited, splits=0, gram=False):
    """What a ratio needs of R `before` a step of 8-bit moments, else of N, where every channel is usable."""
    channels = n if left else m
    size = r * channels * FP32
    kept = (2 if limited else 1) * channels * FP32
    return {
        "low_rank": Bytes(size, 0),
        "gram_grad": Bytes(size if gram and splits else 0, 0),
        "squares": Bytes(splits * channels * FP32, 0),
        "sums": Bytes(0, kept) if before else Bytes(kept, 0),
    }


def scalars(matrices, *, step, rate, draws=False):
    """The scalars of a step; step and rate are types. The rate is read once a block of matrices."""
    blocks = triton.cdiv(matrices, configs.SCALARS["BLOCK"])
    return {
        "steps": Bytes(matrices * step.itemsize, 0),
        "lr": Bytes(blocks * rate.itemsize, 0),
        "rows": Bytes(0, matrices * 6 * FP32),
        "draws": Bytes(0, matrices * torch.int64.itemsize if draws else 0),
    }


def int8_linear(t, m, n, *, back, dtype, group_size, card, bias=None, nf4=False):
    """y (t, m) = x Wᵀ + bias, or dx (t, n) = dy W if `back`: the type of x or dy, and of the bias."""
    plan = configs.plan_int8_linear(t, m, n, back=back, dtype=dtype, group_size=group_size, card=card, nf4=nf4)
    depth, outputs = (m, n) if back else (n, m)
    tall, wide, deep = (triton.cdiv(size, plan.config[f"BLOCK_{axis}"]) for size, axis in ((t, "T"), (outputs, "O"), (depth, "D")))
    parts = plan.splits * t * outputs * FP32 if plan.splits > 1 else 0
    # The bias is added to 16 rows at a time where parts are summed.
    biases = triton.cdiv(t, plan.config["BLOCK_T"]) * (plan.config["BLOCK_T"] // 16 if parts else 1)
    return {
        "rows": Bytes(wide * t * depth * dtype.itemsize, 0),
        "codes": Bytes(tall * m * ((n + 1) // 2 if nf4 else n), 0),
        "scale": Bytes(tall * (wide * m if back else deep * m) * FP32, 0),
        "bias": Bytes(biases * m * bias.itemsize if bias else 0, 0),
        "partials": Bytes(parts, parts),
        "out": Bytes(0, t * outputs * dtype.itemsize),
    }


def scatter_add_product(m, n, r, k, *, dtype):
    """W = scale B A + S of one type, with k entries in each row of S; of the columns at most, every halving whole."""
    config = configs.scatter_add(n, r)
    down, across = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    halvings = 2 * across * m * k.bit_length()
    return {
        "b": Bytes(across * m * r * dtype.itemsize, 0),
        "a": Bytes(down * r * n * dtype.itemsize, 0),
        "values": Bytes(m * k * dtype.itemsize, 0),
        "columns": Bytes((m * k + halvings) * torch.int32.itemsize, 0),
        "out": Bytes(0, m * n * dtype.itemsize),
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
    types = {"weight": param, "low_rank": torch.float32, "basis": torch.float32}
    return gaussian_basis(m if left else n, r), apply(m, n, r, left=left, card=card, **types)


def coefficients(channels, *, per_tensor, limited):
    """The factors of the channels, which end a launch; all are multiplied by what they share, which the limiter may leave at 1."""
    programs = triton.cdiv(channels, configs.RULE["BLOCK_C"])
    size, parts = channels * FP32, (2 * per_tensor + limited) * programs * torch.float64.itemsize
    shared = size if per_tensor or limited else 0
    return {
        "coefficients": Bytes(shared, size + shared),
        "norms": Bytes(parts, parts),
        "limiter": Bytes(FP32, FP32) if limited else Bytes(0, 0),
    }


def _projected(m, n, r, *, left, grad, basis, card, squares):
    """The launches of R = project(G), and how many parts the `squares` of G's channels have; basis None: a key."""
    made = () if basis else (gaussian_basis(m if left else n, r, key=True),)
    basis = basis or torch.float32
    kind = {"left": left, "grad": grad, "basis": basis, "card": card, "squares": squares}
    first = project(m, n, r, **kind)
    splits = plan_project(m, n, r, **kind).splits if squares else 0
    first["squares"] = Bytes(0, splits * (n if left else m) * FP32)
    return *made, first, splits


def step(
    m,
    n,
    r,
    *,
    left,
    weight,
    grad,
    basis,
    card,
    remainder="none",
    moments="fp32",
    projected=False,
    sign=True,
    per_tensor=False,
    limited=True,
    gram=False,
):
    """The launches of a step of one matrix, in order, without the scalars and the codes' own op. weight, grad and basis are types;
    weight may be `Int8`, basis `Int4`, or None for a key. `gram`: with BᵀB, which costs a product with R."""
    shape, kind = (m, n, r), {"left": left, "card": card}
    if remainder == "none":
        x = _type(basis)
        last = apply(*shape, weight=weight, low_rank=x, basis=basis, **kind)
        if projected:
            return (*([rule(*shape, left=left, out=x)] if moments == "fp32" else []), last)
        fused = {"out": x, "moments": True} if moments == "fp32" else {}
        return project(*shape, grad=grad, basis=basis, **fused, **kind), last
    if remainder == "state-free":
        first = project(*shape, grad=grad, basis=basis, **kind)
        middle = [rule(*shape, left=left, out=torch.float32)] if moments == "fp32" else []
        return first, *middle, apply(*shape, weight=weight, low_rank=torch.float32, basis=basis, grad=grad, sign=sign, **kind)
    *launches, splits = _projected(*shape, grad=grad, basis=basis, squares=limited, **kind)
    back = remainder == "scaled-residual"
    if gram and limited:
        # R (r, n) is projected by the symmetric BᵀB as G is by B.
        launches.append(project(*((r, n) if left else (m, r)), r, grad=torch.float32, basis=torch.float32, **kind))
    if moments == "fp32":
        last = rule(*shape, left=left, out=torch.float32 if back else None, splits=splits, gram=gram)
    else:
        launches.append(sums(*shape, left=left, before=True, limited=limited, splits=splits, gram=gram))
        last = sums(*shape, left=left, before=False, limited=limited)
    launches.append(last | coefficients(n if left else m, per_tensor=per_tensor, limited=limited))
    product = {"low_rank": torch.float32, "basis": basis} if back else {}
    return *launches, apply(*shape, weight=weight, grad=grad, coefficients=True, **product, **kind)


def compulsory(m, n, r, *, left, param, grad, basis):
    """Bytes a step moves if every tensor is read once and written once, as the L2 cache allows: G, 2 W, B, 4 moments."""
    channels, depth = (n, m) if left else (m, n)
    return m * n * (grad.itemsize + 2 * param.itemsize) + depth * r * basis.itemsize + 4 * channels * r * FP32
