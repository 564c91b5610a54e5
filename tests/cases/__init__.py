"""The one table of cases: for each op its legal arguments, and what the results must be. Every lane reads it.

One module a group of ops, each with a table CASES: name in `_ops.SCHEMAS`, and of the case if there are several -> Case(arguments,
compare). `arguments` takes a Draw: choices of hypothesis, of a seed or by name. Everything else comes from the schema: guard bands
around every tensor, arguments that are not marked as written, and spoiled arguments.
"""

from cases import (
    apollo_int8,
    blockwise,
    gaussian,
    int4,
    int8,
    nf4,
    projection,
    qgalore,
    residual,
    rounding,
    scatter_add,
    schedule,
    sparse,
    step,
    steps,
    subspace,
    transforms,
)

GROUPS = (
    projection,
    int4,
    steps,
    step,
    subspace,
    int8,
    nf4,
    sparse,
    transforms,
    blockwise,
    gaussian,
    residual,
    schedule,
    qgalore,
    apollo_int8,
    rounding,
    scatter_add,
)
CASES = {name: entry for group in GROUPS for name, entry in group.CASES.items()}
