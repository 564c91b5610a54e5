"""The oracle: every op as plain PyTorch, in the papers' symbols. Serves any device without a build.

Computes in fp32, or in fp64 where the tensors are fp64 (tests use that as the truth).
"""

import torch

from lowrank_sys.reference.adam import adamw_step
from lowrank_sys.reference.galore import (back_project_, channel_norms, galore_step, galore_step_list, project, subspace_step,
                                          subspace_step_list)
from lowrank_sys.reference.gaussian import gaussian_back_project_, gaussian_basis_, gaussian_project
from lowrank_sys.reference.residual import (apollo_step, apollo_step_list, fira_step, fira_step_list, frugal_step,
                                            frugal_step_list)

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
    "gaussian_basis_": gaussian_basis_,
    "gaussian_project": gaussian_project,
    "gaussian_back_project_": gaussian_back_project_,
    "apollo_step.tensor": apollo_step,
    "apollo_step": apollo_step,
    "apollo_step.list": apollo_step_list,
    "fira_step.tensor": fira_step,
    "fira_step": fira_step,
    "fira_step.list": fira_step_list,
    "frugal_step.tensor": frugal_step,
    "frugal_step": frugal_step,
    "frugal_step.list": frugal_step_list,
}


def register(library):
    """Serve every op of IMPLEMENTATIONS on every device that has no kernel of its own."""
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
