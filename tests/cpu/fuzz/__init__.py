"""What the fuzz tests know of each op: how to draw legal arguments, and what the results must be.

One module a group of ops, each with a table FUZZ: name in `_ops.SCHEMAS`, and of the case if there are several -> Fuzz(arguments,
compare). Everything else comes from the schema: guard bands around every tensor, arguments that are not marked as written, and
spoiled arguments.
"""

from fuzz import (
    apollo_int8,
    blockwise,
    gaussian,
    int4,
    int8,
    projection,
    qgalore,
    residual,
    rounding,
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
    sparse,
    transforms,
    blockwise,
    gaussian,
    residual,
    schedule,
    qgalore,
    apollo_int8,
    rounding,
)
FUZZ = {name: entry for group in GROUPS for name, entry in group.FUZZ.items()}
