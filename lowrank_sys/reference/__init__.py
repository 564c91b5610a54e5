"""The oracle: every op as plain PyTorch, in the papers' symbols. Serves any device without a build.

Computes in fp32, or in fp64 where the tensors are fp64 (tests use that as the truth).
"""

from lowrank_sys._ops.rules import implement
from lowrank_sys.reference.adam import adamw_step
from lowrank_sys.reference.apollo_int8 import apollo_int8_step, apollo_int8_step_list
from lowrank_sys.reference.blockwise import (
    adam_8bit_,
    adam_8bit_low_rank_,
    dequantize_blockwise,
    galore_step_8bit,
    galore_step_8bit_int4,
    galore_step_8bit_list,
    quantize_blockwise,
    subspace_step_8bit_int4,
    subspace_step_8bit_list,
)
from lowrank_sys.reference.galore import (
    back_project_,
    channel_norms,
    galore_step,
    galore_step_list,
    project,
    subspace_step,
    subspace_step_list,
)
from lowrank_sys.reference.gaussian import gaussian_back_project_, gaussian_basis_, gaussian_project
from lowrank_sys.reference.int4 import back_project_int4_, dequantize_int4, project_int4, quantize_int4
from lowrank_sys.reference.int8 import dequantize_int8, int8_linear, int8_linear_backward, int8_update_, quantize_int8
from lowrank_sys.reference.qgalore import (
    back_project_int8_,
    qgalore_step,
    qgalore_step_list,
    qgalore_subspace_step,
    qgalore_subspace_step_list,
)
from lowrank_sys.reference.residual import apollo_step, apollo_step_list, fira_step, fira_step_list, frugal_step, frugal_step_list
from lowrank_sys.reference.selection import select_rows
from lowrank_sys.reference.sparse import gather_rows, grass_step, grass_step_list, scatter_add_rows_

IMPLEMENTATIONS = {
    "galore_step.tensor": galore_step,
    "galore_step": galore_step,
    "galore_step.list": galore_step_list,
    "subspace_step.tensor": subspace_step,
    "subspace_step": subspace_step,
    "subspace_step.list": subspace_step_list,
    "adamw_step": adamw_step,
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
    "adam_8bit_": adam_8bit_,
    "adam_8bit_low_rank_": adam_8bit_low_rank_,
    "galore_step_8bit.tensor": galore_step_8bit,
    "galore_step_8bit": galore_step_8bit,
    "galore_step_8bit.list": galore_step_8bit_list,
    "galore_step_8bit.int4": galore_step_8bit_int4,
    "subspace_step_8bit.list": subspace_step_8bit_list,
    "subspace_step_8bit.int4": subspace_step_8bit_int4,
    "project": project,
    "back_project_": back_project_,
    "channel_norms": channel_norms,
    "apollo_int8_step": apollo_int8_step,
    "apollo_int8_step.list": apollo_int8_step_list,
    "apollo_int8_step.tensor": apollo_int8_step,
    "apollo_step": apollo_step,
    "apollo_step.list": apollo_step_list,
    "apollo_step.tensor": apollo_step,
    "back_project_int4_": back_project_int4_,
    "back_project_int8_": back_project_int8_,
    "back_project_int8_.tensor": back_project_int8_,
    "dequantize_int4": dequantize_int4,
    "dequantize_int8": dequantize_int8,
    "fira_step": fira_step,
    "fira_step.list": fira_step_list,
    "fira_step.tensor": fira_step,
    "frugal_step": frugal_step,
    "frugal_step.list": frugal_step_list,
    "frugal_step.tensor": frugal_step,
    "gather_rows": gather_rows,
    "gaussian_back_project_": gaussian_back_project_,
    "gaussian_basis_": gaussian_basis_,
    "gaussian_project": gaussian_project,
    "grass_step": grass_step,
    "grass_step.list": grass_step_list,
    "grass_step.tensor": grass_step,
    "int8_linear": int8_linear,
    "int8_linear_backward": int8_linear_backward,
    "int8_update_": int8_update_,
    "int8_update_.tensor": int8_update_,
    "project_int4": project_int4,
    "qgalore_step": qgalore_step,
    "qgalore_step.list": qgalore_step_list,
    "qgalore_step.tensor": qgalore_step,
    "qgalore_subspace_step": qgalore_subspace_step,
    "qgalore_subspace_step.list": qgalore_subspace_step_list,
    "qgalore_subspace_step.tensor": qgalore_subspace_step,
    "quantize_int4": quantize_int4,
    "quantize_int8": quantize_int8,
    "scatter_add_rows_": scatter_add_rows_,
    "select_rows": select_rows,
}


def register():
    """Serve every op of IMPLEMENTATIONS on every device that has no kernel of its own."""
    for name, function in IMPLEMENTATIONS.items():
        implement(name, function, "CompositeExplicitAutograd")
