"""The oracle: every op as plain PyTorch, in the papers' symbols. Serves any device without a build.

Computes in fp32, or in fp64 where the tensors are fp64 (tests use that as the truth).
"""

from functools import partial

from lowrank_sys._ops.named_steps import FORMS, bound
from lowrank_sys._ops.rules import implement
from lowrank_sys.reference.adam import adamw_step
from lowrank_sys.reference.back_project_int8 import back_project_int8_
from lowrank_sys.reference.blockwise import adam_8bit_, adam_8bit_low_rank_, dequantize_blockwise, quantize_blockwise
from lowrank_sys.reference.galore import back_project_, channel_norms, project
from lowrank_sys.reference.gaussian import gaussian_back_project_, gaussian_basis_, gaussian_project
from lowrank_sys.reference.int4 import back_project_int4_, dequantize_int4, project_int4, quantize_int4
from lowrank_sys.reference.int8 import dequantize_int8, int8_linear, int8_linear_backward, int8_update_, quantize_int8
from lowrank_sys.reference.low_rank_step import step
from lowrank_sys.reference.nf4 import dequantize_nf4, nf4_linear, nf4_linear_backward, quantize_nf4
from lowrank_sys.reference.rounding import round_stochastic_
from lowrank_sys.reference.scatter_add import scatter_add_product
from lowrank_sys.reference.selection import select_rows
from lowrank_sys.reference.sparse import gather_rows, rows_step, scatter_add_rows_

IMPLEMENTATIONS = {
    "adamw_step": adamw_step,
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
    "adam_8bit_": adam_8bit_,
    "adam_8bit_low_rank_": adam_8bit_low_rank_,
    "project": project,
    "back_project_": back_project_,
    "channel_norms": channel_norms,
    "back_project_int4_": back_project_int4_,
    "back_project_int8_": back_project_int8_,
    "back_project_int8_.tensor": back_project_int8_,
    "dequantize_int4": dequantize_int4,
    "dequantize_int8": dequantize_int8,
    "dequantize_nf4": dequantize_nf4,
    "gather_rows": gather_rows,
    "gaussian_back_project_": gaussian_back_project_,
    "gaussian_basis_": gaussian_basis_,
    "gaussian_project": gaussian_project,
    "int8_linear": int8_linear,
    "int8_linear_backward": int8_linear_backward,
    "int8_update_": int8_update_,
    "int8_update_.tensor": int8_update_,
    "nf4_linear": nf4_linear,
    "nf4_linear_backward": nf4_linear_backward,
    "project_int4": project_int4,
    "quantize_int4": quantize_int4,
    "quantize_int8": quantize_int8,
    "quantize_nf4": quantize_nf4,
    "round_stochastic_": round_stochastic_,
    "scatter_add_product": scatter_add_product,
    "scatter_add_rows_": scatter_add_rows_,
    "select_rows": select_rows,
    "step": step,
    "step.rows": rows_step,
}


def named(form):
    """The oracle of a named step, such as galore_step.list; in fp64, where tests take it for the truth, without the rules."""
    return bound(form, partial(step, checked=False), partial(rows_step, checked=False))


ORACLES = {**IMPLEMENTATIONS, **{form: named(form) for form in FORMS}}


def register():
    """Serve every op of IMPLEMENTATIONS on every device that has no kernel of its own."""
    for name, function in IMPLEMENTATIONS.items():
        implement(name, function, "CompositeExplicitAutograd")
