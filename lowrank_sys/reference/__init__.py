"""The oracle: every op as plain PyTorch, in the papers' symbols. Serves any device without a build.

Computes in fp32, or in fp64 where the tensors are fp64 (tests use that as the truth).
"""

import torch

from lowrank_sys.reference.adam import adamw_step
from lowrank_sys.reference.galore import (back_project_, channel_norms, galore_step, galore_step_list, project, subspace_step,
                                          subspace_step_list)
from lowrank_sys.reference.int4 import back_project_int4_, dequantize_int4, project_int4, quantize_int4
from lowrank_sys.reference.int8 import (dequantize_int8, int8_linear, int8_linear_backward, int8_update_, quantize_int8)
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
    "project": project,
    "back_project_": back_project_,
    "channel_norms": channel_norms,
    "back_project_int4_": back_project_int4_,
    "dequantize_int4": dequantize_int4,
    "dequantize_int8": dequantize_int8,
    "gather_rows": gather_rows,
    "grass_step": grass_step,
    "grass_step.list": grass_step_list,
    "grass_step.tensor": grass_step,
    "int8_linear": int8_linear,
    "int8_linear_backward": int8_linear_backward,
    "int8_update_": int8_update_,
    "int8_update_.tensor": int8_update_,
    "project_int4": project_int4,
    "quantize_int4": quantize_int4,
    "quantize_int8": quantize_int8,
    "scatter_add_rows_": scatter_add_rows_,
    "select_rows": select_rows,
}

def register(library):
    """Serve every op of IMPLEMENTATIONS on every device that has no kernel of its own."""
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
