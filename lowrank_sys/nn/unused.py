"""Experts that have tokens on some processes alone."""

import torch


def skips_experts(model):
    """Whether it has modules of experts of which one without tokens has no gradient."""
    return any(getattr(module, "skips_experts", False) for module in model.modules())


def expect_unused_found(module):
    """Raise a RuntimeError in a forward by a DistributedDataParallel that waits for the gradient of every coefficient: an expert
    without tokens has none, and what its process sends next would be taken for what it did not send."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    ddp = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and ddp.require_backward_grad_sync and not (ddp.find_unused_parameters or ddp.static_graph):
        raise RuntimeError(
            f"DistributedDataParallel must have find_unused_parameters=True for projected layers of {type(module).__name__}: an "
            "expert without tokens has no gradient"
        )
