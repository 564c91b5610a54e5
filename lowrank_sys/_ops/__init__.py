"""Schemas and fakes of every `torch.ops.lowrank` op: the API, and the executable rules of its shapes and dtypes.

Symbols: W (m, n) is a weight as `nn.Linear` stores it, G its gradient, B the basis, R the low-rank gradient.

| side         | basis B | project            | back  |
|--------------|---------|--------------------|-------|
| `left=True`  | (m, r)  | R = Bᵀ G, (r, n)   | B X   |
| `left=False` | (n, r)  | R = G B, (m, r)    | X Bᵀ  |

A *channel* is an index of the axis that is not projected: a column of G if left, a row if right. A channel of R that holds
a value that is not finite, or whose square overflows fp32, is skipped: its moments and its weights stay as they are.

One module a group of ops: its schemas, the rules of its arguments (`check_*`, which every implementation calls) and its fakes.
"""

from lowrank_sys._ops import (
    back_project_int8,
    blockwise,
    dct,
    gaussian,
    int4,
    int8,
    named_steps,
    nf4,
    orthogonalize,
    projection,
    refresh,
    rounding,
    scatter_add,
    sparse,
    step,
    steps,
    subspace,
    transport,
)
from lowrank_sys._ops.rules import FLOATS as FLOATS
from lowrank_sys._ops.rules import library as library
from lowrank_sys._ops.rules import low_rank_shape as low_rank_shape

_GROUPS = (
    projection,
    int4,
    steps,
    step,
    named_steps,
    subspace,
    int8,
    nf4,
    sparse,
    transport,
    dct,
    orthogonalize,
    blockwise,
    gaussian,
    refresh,
    back_project_int8,
    rounding,
    scatter_add,
)
SCHEMAS = {name: schema for group in _GROUPS for name, schema in group.SCHEMAS.items()}
