"""A communication hook of DistributedDataParallel: of a gradient that the optimizer projects in its step R crosses the wire."""

import torch
import torch.distributed as dist

from lowrank_sys.subspace.basis import store_of
from lowrank_sys.subspace.matrices import each
from lowrank_sys.subspace.refresh import is_due


class LowRankState:
    """What `low_rank_hook` asks: `ddp.register_comm_hook(LowRankState(optimizer), low_rank_hook)`.

    Args:
        optimizer: a LowRankOptimizer with per_layer None over the parameters of `ddp`, whose step needs nothing of a gradient but
            R: the GaLore presets, on bases that are orthonormal.

    Raises ValueError for another.
    """

    def __init__(self, optimizer):
        name = type(optimizer).__name__
        if not optimizer.pipeline.from_low_rank:
            raise ValueError(f"optimizer must be one whose step needs nothing of a gradient but R, got {name}")
        if optimizer.gradients.served_by_hooks:
            raise ValueError("optimizer must have per_layer=None: the gradients of others are low-rank before they are averaged")
        for g, group in enumerate(optimizer.param_groups):
            if group.get("quant"):
                raise ValueError(f"quant must be False, got True in group {g}: R of back(R) is R on orthonormal bases alone")
        self.optimizer = optimizer

    @property
    def world(self):
        return self.optimizer.gradients.world

    def groups(self):
        """{parameter: its group} of those with a rank."""
        return {p: group for group in self.optimizer.param_groups if "rank" in group for p in group["params"]}

    def matrices(self, group, param, grad):
        """[(gradient, state)] of the matrices of a parameter if the next step renews the basis of none of them, else None."""
        state = self.optimizer.state.get(param)
        if not state:
            return None
        found = [(g, one) for _, g, one in each(param, grad, state)]
        return found if all(_stays(group, one) for _, one in found) else None


def _stays(group, state):
    """Whether the next step needs nothing but R: no basis is chosen from its gradient, nor sketched."""
    wait = int(state["countdown"])
    if "missed" in state and state["missed"]:
        return False
    return not is_due(wait) if group["refresh"] == "next" else wait > 0


def low_rank_hook(state: LowRankState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of a bucket: of a matrix whose basis stays in this step R alone, and then fill in back(R), of which the
    step finds the same R; of all else, and in a step that refreshes, the gradient.

    What goes over `.grad` sees back(R), whose norm is that of R.
    """
    groups, sent, taken = state.groups(), [], []
    for param, grad in zip(bucket.parameters(), bucket.gradients()):
        parts = state.matrices(groups[param], param, grad) if param in groups else None
        taken.append(parts)
        sent += [grad] if parts is None else [store_of(one).project(g, one).to(grad.dtype) for g, one in parts]
    if all(parts is None for parts in taken):
        flat = bucket.buffer()
    else:
        flat = torch.cat([tensor.reshape(-1) for tensor in sent])
    flat.div_(state.world.size)

    def fill(future):
        flat = future.value()[0]
        if flat.data_ptr() != bucket.buffer().data_ptr():
            pieces = iter(piece.view_as(like) for piece, like in zip(flat.split([tensor.numel() for tensor in sent]), sent))
            for grad, parts in zip(bucket.gradients(), taken):
                if parts is None:
                    grad.copy_(next(pieces))
                else:
                    grad.zero_()
                    for g, one in parts:
                        store_of(one).back_(g, next(pieces), one)
        return bucket.buffer()

    return dist.all_reduce(flat, group=state.world.group, async_op=True).get_future().then(fill)
