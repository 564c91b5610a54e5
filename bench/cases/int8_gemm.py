"""The products of a GaLore step in INT8, and the steps on them. Errors are those of quantising: the truth has no codes."""

import functools

from lowrank_sys.bench.cases import projection, steps


def _in_int8(op):
    """The case of an op with int8_gemm=True."""

    def call(function, tensors, case):
        return op.call(functools.partial(function, int8_gemm=True), tensors, case)

    def truth(*args, int8_gemm, **keys):
        return op.oracle(*args, **keys)

    return op._replace(call=call, truth=truth, other="products of bytes")  # no ceiling of theirs is measured


OPS = {
    f"{name}-int8": _in_int8(op)
    for name, op in (projection.OPS | steps.OPS).items()
    if name in ("project", "back_project_", "galore_step", "subspace_step")
}
