"""Thirty faults that the tests must see: each is a change of one place, on which everything still runs.

`old` occurs once in `file`. A C++ mutant is compiled in beside the original and chosen at run time, so `old` is an expression or
whole statements. A Python mutant, Triton included, is written into the copy that runs it.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault.

    name: what it does. file: where. old, new: the text. tests: those that are likely to see it, which are asked first. case: of
    tests/golden/runner.py, which trains on all the same, and to other numbers; None where a CPU with one thread cannot tell.
    seen_by: those of the tests, as pytest's -k has it, that have seen it and are asked before all others.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    case: str | None = None
    seen_by: str = ""


def cpu(*names):
    return tuple(f"tests/cpu/test_{name}.py" for name in names)


INTERPRET = tuple(f"tests/interpret/test_{name}.py" for name in ("numerics", "qgalore", "residual"))

MUTANTS = (
    # csrc/core
    Mutant(
        "no decay",
        "csrc/core/adam.h",
        "float(1 - lr * weight_decay)",
        "1.0f",
        cpu("every_op", "optim"),
        "galore, fp32, plain",
        seen_by="named_sizes and adamw_step",
    ),
    Mutant(
        "V with beta1",
        "csrc/core/adam.h",
        "s.beta2 * v + s.one_minus_beta2 * g * g",
        "s.beta1 * v + s.one_minus_beta1 * g * g",
        cpu("every_op", "optim"),
        "galore, fp32, plain",
        seen_by="named_sizes and adamw_step",
    ),
    Mutant(
        "V without bias correction",
        "csrc/core/adam.h",
        "sqrtf(v / s.correction2)",
        "sqrtf(v)",
        cpu("every_op", "optim"),
        "galore, fp32, plain",
        seen_by="named_sizes and adamw_step",
    ),
    Mutant(
        "the last row of R is not tested",
        "csrc/core/low_rank.h",
        "usable(row[k * Block::threads] * grad_scale)",
        "(i + 1 == rows || usable(row[k * Block::threads] * grad_scale))",
        cpu("every_op", "fuzz"),
        seen_by="named_sizes and galore_step",
    ),
    Mutant(
        "8-bit Adam writes weights of unusable gradients",
        "csrc/core/adam_8bit.h",
        "choose(usable(g[e]), draw.template round<W>(apply_update(to_float(old[e]), update[e], s), e), old[e])",
        "draw.template round<W>(apply_update(to_float(old[e]), update[e], s), e)",
        cpu("every_op", "adam_8bit"),
        seen_by="skipped_elements",
    ),
    Mutant(
        "Philox counts the step twice and no parameter",
        "csrc/core/philox.h",
        "philox(uint32_t(group), uint32_t(group >> 32), stream.step, stream.parameter, stream.seed)",
        "philox(uint32_t(group), uint32_t(group >> 32), stream.step, stream.step, stream.seed)",
        cpu("select_rows", "int8"),
        "grass sample left, fp32, plain",
        seen_by="selection_is_the_oracles",
    ),
    Mutant(
        "every INT4 group has the offset of the first",
        "csrc/core/int4.h",
        "at.offset += vector * basis.groups() + group;",
        "at.offset += vector * basis.groups();",
        cpu("every_op", "int4"),
        "q-galore, fp32, plain",
        seen_by="named_sizes and quantize_int4",
    ),
    Mutant(
        "a norm without its last element",
        "csrc/core/norms.h",
        "whole + lane_of<V>(block, k) < n",
        "whole + lane_of<V>(block, k) < n - 1",
        cpu("every_op", "sparse"),
        "grass sample left, fp32, plain",
        seen_by="named_sizes and norms",
    ),
    Mutant(
        "the sign of the residual turned",
        "csrc/core/residual.h",
        "sign_of(x - inside[i])",
        "sign_of(inside[i] - x)",
        cpu("every_op", "residual", "optim_family"),
        "frugal, fp32, plain",
        seen_by="named_sizes and frugal_step",
    ),
    Mutant(
        "an update of rows without their scale",
        "csrc/core/rows.h",
        "apply_update(to_float(w), rho * x, s)",
        "apply_update(to_float(w), x, s)",
        cpu("every_op", "sparse"),
        "grass sample left, fp32, plain",
        seen_by="named_sizes and grass_step",
    ),
    Mutant(
        "the threshold of a sample is its last row",
        "csrc/core/selection.h",
        "kth_smallest(block, s.keys, s.d, s.r + 1, bits)",
        "kth_smallest(block, s.keys, s.d, s.r, bits)",
        cpu("select_rows"),
        "grass sample left, fp32, plain",
        seen_by="selection_is_the_oracles",
    ),
    Mutant(
        "no barrier after the sum of threads",
        "csrc/core/block.h",
        "block.sync();\n    return sum;",
        "return sum;",
        ("tests/host/test_executables.py::test_sanitizer[thread]",),
    ),
    Mutant(
        "no barrier between random bits and rounding",
        "csrc/core/int8.h",
        "block.sync();\n    int8_round<V, false>(block, codes, update, random, n, inverse, 1.0f, u);",
        "int8_round<V, false>(block, codes, update, random, n, inverse, 1.0f, u);",
        ("tests/host/test_executables.py::test_sanitizer[thread]",),
    ),
    # csrc/cpu
    Mutant(
        "half bytes swapped where a range begins in one",
        "csrc/cpu/int4.cpp",
        "at % 2 * 4",
        "(1 - at % 2) * 4",
        cpu("every_op", "qgalore"),
        seen_by="named_sizes and int4",
    ),
    # csrc/ops
    Mutant(
        "found_inf is not looked at",
        "csrc/ops/cpu/hyper.h",
        "guards.found_inf && *data<float>(*guards.found_inf) != 0.0f",
        "false",
        cpu("every_op", "optim"),
        "galore, fp32, scaled",
        seen_by="named_sizes and galore_step",
    ),
    Mutant(
        "skipped weights counted on the wrong side",
        "csrc/ops/cpu/step.cpp",
        "skipped * depth()",
        "skipped * x_.weight.size(left_ ? 1 : 0)",
        cpu("every_op", "optim"),
        "galore, fp32, poisoned",
        seen_by="named_sizes and galore_step",
    ),
    # kernels
    Mutant(
        "a split product without its last part",
        "kernels/epilogue.py",
        "in range(splits)",
        "in range(splits - 1)",
        INTERPRET,
        seen_by="galore_step",
    ),
    Mutant(
        "random halves swapped",
        "kernels/random.py",
        "(o_element & 1) * 16",
        "(1 - (o_element & 1)) * 16",
        ("tests/interpret/test_random.py", "tests/interpret/test_int8.py"),
    ),
    Mutant(
        "ties in bf16 away from zero",
        "kernels/common.py",
        "bits + 0x7FFF + ((bits >> 16) & 1)",
        "bits + 0x8000",
        INTERPRET,
        seen_by="store_rounds",
    ),
    Mutant(
        "a channel whose residual overflows is used",
        "kernels/channels.py",
        'b_ok = b_ok & (b_residual < float("inf"))',
        "b_ok = b_ok",
        INTERPRET[2:],
        seen_by="squares_overflow",
    ),
    # lowrank_sys/subspace
    Mutant(
        "a gap short by one",
        "lowrank_sys/subspace/refresh.py",
        "fill_(call.kind.gap(due[i]))",
        "fill_(call.kind.gap(due[i]) - 1)",
        cpu("optim"),
        "galore, fp32, plain",
        seen_by="refreshes_are_staggered",
    ),
    Mutant(
        "moments in fp32 are not rotated",
        "lowrank_sys/subspace/transport.py",
        "due.write(name, rotated(",
        "(lambda *_: None)(name, rotated(",
        cpu("subspace", "optim"),
        "galore rotate, fp32, plain",
        seen_by="rotated_moments",
    ),
    Mutant(
        "a reset keeps the step",
        "lowrank_sys/subspace/refresh.py",
        'self.state["step"].zero_()',
        "pass",
        cpu("optim", "optim_family"),
        "galore reset, fp32, plain",
        seen_by="moments_at_a_refresh",
    ),
    Mutant(
        "gaps grow by a sum",
        "lowrank_sys/subspace/gap.py",
        "gap.item() * gamma_proj",
        "gap.item() + gamma_proj",
        cpu("adaptive_gap"),
        "galore adaptive, fp32, plain",
        seen_by="flipped_vectors",
    ),
    # lowrank_sys/optim
    Mutant(
        "the sketch is that of the last micro-batch",
        "lowrank_sys/optim/sketch_sum.py",
        "self.total.add_(product)",
        "self.total = product",
        cpu("accumulate"),
        "galore, fp32, accumulate",
    ),
    Mutant(
        "every matrix draws the bits of the first",
        "lowrank_sys/optim/weight.py",
        'state["parameter"] = index',
        'state["parameter"] = 0',
        cpu("optim_int8"),
        "galore, int8, plain",
    ),
    Mutant(
        "a loaded state begins at step 0",
        "lowrank_sys/optim/loading.py",
        "placed(key, value, param.device)",
        'placed(key, value * (key != "step"), param.device)',
        cpu("optim"),
        "galore, fp32, plain",
    ),
    Mutant(
        "clipping lengthens short gradients",
        "lowrank_sys/optim/clip.py",
        "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "(max_norm / (norm + 1e-6))",
        cpu("accumulate", "per_layer"),
        "galore, fp32, clipped in R",
    ),
    Mutant(
        "GradScaler's factor multiplies",
        "lowrank_sys/optim/optimizer.py",
        "grad_scale = grad_scale.reciprocal()",
        "grad_scale = grad_scale.clone()",
        cpu("optim", "per_layer"),
        "galore, fp32, scaled",
    ),
    Mutant(
        "a limit of 10% a step",
        "lowrank_sys/optim/remainder.py",
        "GROWTH = 1.01",
        "GROWTH = 1.1",
        cpu("optim_family"),
        "fira, fp32, plain",
    ),
)
