"""The oracle: every op as plain PyTorch, in the papers' symbols. Serves any device without a build.

Computes in fp32, or in fp64 where the tensors are fp64 (tests use that as the truth).
"""

import torch

from lowrank_sys.reference.adam import adamw_step
from lowrank_sys.reference.blockwise import (adam_8bit_, adam_8bit_low_rank_, dequantize_blockwise, galore_step_8bit,
                                             galore_step_8bit_list, quantize_blockwise)
from lowrank_sys.reference.galore import (back_project_, channel_norms, galore_step, galore_step_list, project, subspace_step,
                                          subspace_step_list)

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
    "project": project,
    "back_project_": back_project_,
    "channel_norms": channel_norms,
}


def register(library):
    """Serve every op of IMPLEMENTATIONS on every device that has no kernel of its own."""
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
