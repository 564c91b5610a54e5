"""Steps on INT8 weights: the oracle's bits where products are exact, the parts they are made of, and what rounding promises."""

import pytest
import torch
from threads import threads

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
STREAM = dict(seed=-3, parameter=7)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
BASES = pytest.mark.parametrize("int4", [True, False], ids=["int4", "dense"])
METHODS = ("qgalore_step", "qgalore_subspace_step", "apollo_int8_step")
# m, n, r and the groups of the weight and of the basis: one element, short groups, several tiles of either axis, no rows.
SHAPES = [
    (1, 1, 1, 32, 32),
    (33, 100, 5, 64, 32),
    (70, 300, 9, 256, 64),
    (1030, 60, 3, 32, 256),
    (40, 3100, 16, 1024, 256),
    (0, 20, 2, 32, 32),
    (20, 0, 2, 32, 32),
]

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def same(got, want):
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(got, want, strict=True)
    )


def low_rank(m, n, r, left):
    return (r, n) if left else (m, r)


def exact_product(m, n, r, basis_group_size, left, int4, dtype):
    """X and a basis whose product is exact in fp32: no order of the sums matters."""
    d = m if left else n
    x = whole(-4, 5, *low_rank(m, n, r, left))
    if not int4:
        return x, (whole(-4, 5, d, r, seed=1).to(dtype), None, None)
    packed = whole(0, 256, r, (d + 1) // 2, seed=1).to(torch.uint8)
    if d % 2:
        packed[:, -1:] &= 15
    groups = -(-d // basis_group_size)
    return x, (packed, torch.full((r, groups), 0.5), whole(-4, 5, r, groups, seed=2))


@SIDES
@pytest.mark.parametrize("basis", [("int4", torch.float32), *(("dense", dtype) for dtype in FLOATS)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_a_back_projection_are_the_oracles(shape, basis, left):
    """Over updates that keep all scales, replace some, and replace all; with channels that are left out."""
    m, n, r, group_size, basis_group_size = shape
    weight = randn(m, n)
    weight[: m // 4] = 0.0
    x, b = exact_product(m, n, r, basis_group_size, left, basis[0] == "int4", basis[1])
    if x.numel():
        (x[:, n // 2] if left else x[m // 2]).fill_(torch.nan)
    got = ops.quantize_int8(weight, group_size=group_size)
    want = [t.clone() for t in got]
    for step, alpha, offset in ((0, 2.0**-14, 0), (1, -(2.0**-6), 3), (2, 3.0, 8), (3, 0.0, 2**40)):
        call = dict(
            alpha=alpha,
            decay=1.0 if alpha == 0 else 0.9,
            left=left,
            step=step,
            offset=offset,
            group_size=group_size,
            basis_group_size=basis_group_size,
            **STREAM,
        )
        again = [t.clone() for t in got]
        reference.back_project_int8_(*want, x, *b, **call)
        ops.back_project_int8_(*got, x, *b, **call)
        numbers = {name: torch.tensor(call[name], dtype=torch.float64) for name in ("alpha", "decay", "step")}
        ops.back_project_int8_(*again, x, *b, **call | numbers)
        assert same(got, want) and same(again, want)


@SIDES
@BASES
def test_a_channel_that_is_left_out_keeps_its_weights(int4, left):
    m, n, r = 40, 300, 4
    codes, scale = ops.quantize_int8(randn(m, n), group_size=64)
    x, b = exact_product(m, n, r, 32, left, int4, torch.float32)
    bad = torch.zeros(n if left else m, dtype=torch.bool)
    bad[[1, 17, 30]] = True
    if left:
        x[0, bad] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    else:
        x[bad, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    before = codes.clone(), scale.clone()
    ops.back_project_int8_(
        codes, scale, x, *b, alpha=1e-4, decay=0.999, left=left, step=1, group_size=64, basis_group_size=32, **STREAM
    )
    out = bad[None, :].expand(m, n) if left else bad[:, None].expand(m, n)
    assert torch.equal(scale, before[1]), "the update is small: scales stay"
    assert torch.equal(codes[out], before[0][out]) and not torch.equal(codes[~out], before[0][~out])


@BASES
def test_row_shards_draw_the_bits_of_the_whole(int4):
    """A shard of rows with the offset of its first element; right: the basis is along the columns, and every row has its R."""
    m, n, r = 50, 301, 4
    weight = ops.quantize_int8(randn(m, n), group_size=64)
    x, b = exact_product(m, n, r, 32, False, int4, torch.float32)
    call = dict(alpha=2.0**-8, decay=0.99, left=False, step=3, group_size=64, basis_group_size=32, **STREAM)
    parts = [[t[rows].clone() for t in weight] for rows in (slice(0, 17), slice(17, 50))]
    ops.back_project_int8_(*weight, x, *b, **call)
    for part, rows in zip(parts, (slice(0, 17), slice(17, 50))):
        ops.back_project_int8_(*part, x[rows].contiguous(), *b, offset=rows.start * n, **call)
    assert same([torch.cat(t) for t in zip(*parts)], weight)


class Matrix:
    """Arguments of a step on one matrix, by its schema's names."""

    def __init__(
        self, op, m, n, r, left, int4=True, group_size=64, basis_group_size=32, dtype=torch.float32, seed=0, limited=False
    ):
        d, shape = m if left else n, low_rank(m, n, r, left)
        codes, scale = ops.quantize_int8(0.1 * randn(m, n, seed=seed), group_size=group_size)
        basis = torch.linalg.qr(randn(d, r, seed=seed + 1)).Q.contiguous()
        self.args = dict(codes=codes, weight_scale=scale)
        if op == "qgalore_subspace_step":
            self.args["low_rank_grad"] = randn(*shape, seed=seed + 2)
        else:
            self.args["grad"] = randn(m, n, seed=seed + 2, dtype=dtype)
        first, second = 0.1 * randn(*shape, seed=seed + 3), 0.1 * randn(*shape, seed=seed + 4).abs() + 0.01
        if op == "apollo_int8_step":
            self.args |= dict(basis=basis, exp_avg=first, exp_avg_sq=second, limiter=torch.tensor(0.5) if limited else None)
            self.settings = dict(group_size=group_size, scale=1.0)
        else:
            self.args |= dict(
                zip(
                    ("basis", "basis_scale", "basis_offset"),
                    ops.quantize_int4(basis, group_size=basis_group_size) if int4 else (basis, None, None),
                )
            )
            moments = [reference.quantize_blockwise(x, signed=s, by_row=True) for x, s in ((first, True), (second, False))]
            self.args |= dict(
                exp_avg=moments[0][0], exp_avg_sq=moments[1][0], exp_avg_absmax=moments[0][1], exp_avg_sq_absmax=moments[1][1]
            )
            self.settings = dict(group_size=group_size, basis_group_size=basis_group_size, scale=0.25)
        self.op, self.left = op, left
        self.settings |= dict(left=left, **ADAM)

    def copy(self):
        other = Matrix.__new__(Matrix)
        other.__dict__ |= self.__dict__
        other.args = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self.args.items()}
        return other

    def tensors(self):
        return [value for value in self.args.values() if value is not None]

    def step(self, count, lr=1e-2, function=None, seed=-3, parameter=7, **more):
        (function or getattr(ops, self.op))(
            *self.args.values(), step=count, lr=lr, seed=seed, parameter=parameter, **self.settings, **more
        )

    def weight(self):
        return reference.dequantize_int8(self.args["codes"], self.args["weight_scale"], group_size=self.settings["group_size"])


def step_list(matrices, steps, lr=1e-2, seed=-3, parameters=None, function=None, **more):
    columns = [[matrix.args[name] for matrix in matrices] for name in matrices[0].args]
    columns = [[] if column[0] is None else column for column in columns]
    (function or getattr(ops, matrices[0].op).list)(
        *columns,
        steps,
        lr=torch.tensor(lr, dtype=torch.float64),
        seed=seed,
        parameters=parameters or [7] * len(matrices),
        **matrices[0].settings,
        **more,
    )


def assert_near(got, want):
    """Behind products that differ in the last bits: neighbouring codes, and few of them.

    A number of up to 127 steps is off by some 127 * 2^-20 of a step, and the code flips where a random number of 16 bits lies
    in between: one in some thousands.
    """
    groups = (got.args["weight_scale"] - want.args["weight_scale"]).abs() <= 1e-4 * want.args["weight_scale"].abs()
    assert groups.double().mean() > 0.97
    wide = groups.repeat_interleave(got.settings["group_size"], 1)[:, : got.args["codes"].shape[1]]
    difference = (got.args["codes"].int() - want.args["codes"].int()).abs()[wide]
    assert difference.max() <= 1 and (difference > 0).sum() <= 2 + difference.numel() // 200


# R is fp32, and APOLLO knows one kind of basis here.
CALLS = [
    (op, dtype, int4)
    for op in METHODS
    for dtype in FLOATS
    for int4 in (True, False)
    if (op != "apollo_int8_step" or int4) and (op != "qgalore_subspace_step" or dtype == torch.float32)
]


@SIDES
@pytest.mark.parametrize("op, dtype, int4", CALLS, ids=str)
def test_steps_against_the_oracle(op, dtype, int4, left):
    got = Matrix(op, 90, 333, 8, left, int4, dtype=dtype, limited=True)
    want = got.copy()
    before = got.args["codes"].clone()
    got.step(3, lr=0.1)
    want.step(3, lr=0.1, function=reference.ORACLES[op])
    assert_near(got, want)
    assert (got.args["codes"] != before).double().mean() > 0.3, "most weights move"
    step, lr = torch.tensor(3.0), torch.tensor(0.1, dtype=torch.float64)
    again = Matrix(op, 90, 333, 8, left, int4, dtype=dtype, limited=True)
    again.step(step, lr)
    assert same(again.tensors(), got.tensors())


@SIDES
@BASES
def test_a_step_is_its_parts(int4, left):
    """project, 8-bit Adam, back-projection: the same bits, as every part is the same code."""
    whole_step, parts = (Matrix("qgalore_step", 64, 300, 8, left, int4) for _ in range(2))
    whole_step.step(5)
    a = parts.args
    basis = [a[name] for name in ("basis", "basis_scale", "basis_offset")]
    size = parts.settings["basis_group_size"]
    r = ops.project_int4(a["grad"], *basis, left=left, group_size=size) if int4 else ops.project(a["grad"], basis[0], left=left)
    x = torch.empty_like(r)
    moments = [[a[name]] for name in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")]
    ops.adam_8bit_low_rank_([r], [x], *moments, [torch.tensor(5.0)], beta1=0.9, beta2=0.999, eps=1e-8, left=left)
    ops.back_project_int8_(
        a["codes"],
        a["weight_scale"],
        x,
        *basis,
        alpha=-1e-2 * 0.25,
        decay=1 - 1e-2 * 0.1,
        left=left,
        seed=-3,
        step=5,
        parameter=7,
        group_size=64,
        basis_group_size=size,
    )
    assert same(whole_step.tensors(), parts.tensors())
    # From R it is the other op.
    other = Matrix("qgalore_step", 64, 300, 8, left, int4)
    args = list(other.args.values())
    args[2] = r
    ops.qgalore_subspace_step(*args, step=5, lr=1e-2, **STREAM, **other.settings)
    assert same(
        [args[0], args[1], *args[6:]], [whole_step.args["codes"], whole_step.args["weight_scale"], *whole_step.tensors()[-4:]]
    )


@SIDES
@pytest.mark.parametrize("op", METHODS)
def test_the_mean_over_random_bits_is_the_step_without_rounding(op, left):
    """Stochastic rounding is unbiased: 256 parameters' codes average to the weight in fp32."""
    start = Matrix(op, 16, 64, 4, left, False)
    exact = start.copy()
    dense = exact.weight()
    a = exact.args
    if op == "apollo_int8_step":
        ops.apollo_step(
            dense, a["grad"], a["basis"], a["exp_avg"], a["exp_avg_sq"], a["limiter"], step=2, lr=1e-2, scale=1.0, left=left, **ADAM
        )
    else:
        grad = a["grad"] if "grad" in a else reference.galore.back(a["low_rank_grad"], a["basis"], left)
        ops.galore_step_8bit(
            dense, grad, a["basis"], *(a[name] for name in list(a)[-4:]), step=2, lr=1e-2, scale=0.25, left=left, **ADAM
        )
    total = torch.zeros_like(dense, dtype=torch.float64)
    for parameter in range(256):
        one = start.copy()
        one.step(2, parameter=parameter)
        total += one.weight()
    # An error in one step of the scale has a variance of at most 1/4; five of its standard deviations in 1024 elements.
    scale = torch.maximum(one.args["weight_scale"], start.args["weight_scale"]).repeat_interleave(64, 1)
    assert ((total / 256 - dense).abs() <= scale * (5 * 0.5 / 16 + 1e-3)).all()


@pytest.mark.parametrize("op", METHODS)
def test_grad_scale_multiplies_the_gradient(op):
    scaled, plain = (Matrix(op, 20, 100, 4, True) for _ in range(2))
    name = "low_rank_grad" if "subspace" in op else "grad"
    scaled.args[name] *= 4
    for matrix, factor in ((scaled, 0.25), (plain, None)):
        step_list([matrix], [torch.tensor(1.0)], grad_scale=None if factor is None else torch.tensor([factor]))
    scaled.args[name] /= 4
    assert same(scaled.tensors(), plain.tensors())


@SIDES
@pytest.mark.parametrize("op", METHODS)
def test_bad_channels_keep_their_weights_and_are_counted(op, left):
    matrix = Matrix(op, 40, 256, 4, left, limited=True)
    name = "low_rank_grad" if "subspace" in op else "grad"
    gradient, channels = matrix.args[name], 256 if left else 40
    bad = torch.zeros(channels, dtype=torch.bool)
    bad[[2, 30]] = True
    (gradient[0] if left else gradient[:, 0])[bad] = torch.tensor([torch.nan, torch.inf])
    before, skipped = matrix.copy(), torch.tensor(0)
    step_list([matrix], [torch.tensor(4.0)], lr=1e-4, skipped=skipped)
    assert skipped == 2 * (40 if left else 256)
    out = bad[None, :].expand(40, 256) if left else bad[:, None].expand(40, 256)
    kept = matrix.args["weight_scale"] == before.args["weight_scale"]
    assert kept.double().mean() > 0.9
    out_kept = out & kept.repeat_interleave(64, 1)
    assert torch.equal(matrix.args["codes"][out_kept], before.args["codes"][out_kept])
    if not left:
        assert torch.equal(matrix.args["codes"][bad], before.args["codes"][bad]) and kept[bad].all()
    assert not torch.equal(matrix.args["codes"][~out], before.args["codes"][~out])
    assert matrix.weight().isfinite().all()


@pytest.mark.parametrize("op", METHODS)
def test_an_update_of_zero_touches_no_byte(op):
    matrix = Matrix(op, 20, 100, 4, True)
    before = matrix.copy()
    matrix.step(1, lr=0.0)
    assert same([matrix.args["codes"], matrix.args["weight_scale"]], [before.args["codes"], before.args["weight_scale"]])


@pytest.mark.parametrize("left", [True, False])
def test_apollo_with_a_key_is_apollo_with_its_basis(left):
    m, n, r = 60, 200, 8
    stored, key = (Matrix("apollo_int8_step", m, n, r, left) for _ in range(2))
    key.args["basis"] = torch.tensor([5, 2, 3, 0])
    basis = torch.empty(m if left else n, r)
    ops.gaussian_basis_(basis, seed=5, step=2, parameter=3)
    stored.args["basis"] = basis
    for matrix in (stored, key):
        matrix.step(1)
    assert_near(key, stored)


@pytest.mark.parametrize("op", METHODS)
def test_no_thread_count_changes_the_bits(op):
    results = []
    for count in (1, 2):
        with threads(count):
            # Along one basis vector no product depends on the order of its sums.
            matrix = Matrix(op, 300, 1100, 1, False)
            if op != "qgalore_subspace_step":
                matrix.args["grad"][:, 1:] = 0
            matrix.step(1)
        results.append(matrix.tensors())
    assert same(*results)
