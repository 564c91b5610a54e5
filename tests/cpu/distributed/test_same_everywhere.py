"""Ranks that would drift apart are told at their first step, all of them, in what they differ."""

import pytest
import torch.distributed as dist
import world
from projected_model import galore, llama
from small import assert_same, backward, ids_of, weights
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.optim import APOLLOAdamW, AtStep, GaLoreAdamW, param_groups

# name -> (what rank 2 of 3 has instead, what the message says)
DIFFERENT = {
    "update_proj_gap": ({"update_proj_gap": 5}, "update_proj_gap of group 1 is 4 on ranks 0, 1, 5 on rank 2"),
    "rank": ({"rank": 4}, "rank of group 1 is 8 on ranks 0, 1, 4 on rank 2"),
    "method": ({"cls": APOLLOAdamW}, "method is 'GaLoreAdamW' on ranks 0, 1, 'APOLLOAdamW' on rank 2"),
    "seed": ({"seed": 1}, "seed of group 1 is 0 on ranks 0, 1, 1 on rank 2"),
    "shapes": ({"intermediate_size": 40}, r"shape of model.layers.0.mlp.gate_proj.weight is \(48, 32, torch"),
    "per_layer": ({"per_layer": "accumulate"}, "per_layer is None on ranks 0, 1, 'accumulate in torch.float32"),
}


def made(intermediate_size=48, rank=8, cls=GaLoreAdamW, per_layer=None, **keys):
    model = llama(intermediate_size=intermediate_size)
    return model, cls(param_groups(model, **{"update_proj_gap": 4, "rank": rank, **keys}), lr=1e-2, per_layer=per_layer)


def differ(rank):
    for changed, message in DIFFERENT.values():
        with pytest.raises(RuntimeError, match=message):
            made(**(changed if rank == 2 else {}))
    return True


def test_every_rank_says_in_what_they_differ():
    assert world.run(3, differ) == [True] * 3


def late(rank, folder):
    dist.destroy_process_group()
    model, optimizer = made(update_proj_gap=4 + rank)
    before = weights(model)
    dist.init_process_group("gloo", init_method=f"file://{folder}/later", rank=rank, world_size=2)
    backward(model, ids_of(0))
    with pytest.raises(RuntimeError, match="the ranks differ: update_proj_gap of group 1 is 4 on rank 0, 5 on rank 1"):
        optimizer.step()
    assert_same(weights(model), before)
    return True


def test_a_world_that_comes_after_the_optimizer_is_compared_at_the_first_step(tmp_path):
    assert world.run(2, late, str(tmp_path)) == [True] * 2


def alone_in_backward(rank):
    with pytest.raises(RuntimeError, match="runs in one process, got 2.*use per_layer='accumulate'"):
        galore(llama(), "in_backward")
    # two halves of a pipeline: each rank a world of its own
    own = [dist.new_group([r]) for r in range(2)][rank]
    model, optimizer = made(intermediate_size=48 - 8 * rank, per_layer=AtStep(process_group=own))
    backward(model, ids_of(0))
    optimizer.step()
    # and once they have met, nothing more is said
    sent = []
    gather = dist.all_gather_object
    dist.all_gather_object = lambda *args, **kwargs: sent.append(args) or gather(*args, **kwargs)
    model, optimizer = made()
    ddp = DistributedDataParallel(model)
    for step in range(3):
        backward(ddp, ids_of(step))
        optimizer.step()
        optimizer.zero_grad()
    return len(sent)


def test_what_runs_in_a_world_of_its_own():
    assert world.run(2, alone_in_backward) == [1, 1]
