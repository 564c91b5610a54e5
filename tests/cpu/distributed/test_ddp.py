"""DistributedDataParallel around every mode: R is what is reduced, and all ranks stay one model."""

import pytest
import torch
import world
from projected_model import galore, llama, projected
from small import CLOSE, assert_same, bases, train, weights
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.nn import project_model

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 9  # the first bases are spread over four steps, and each is renewed at least once more

# name -> (a model and its optimizer)
MODES = {
    "step": lambda seed: at_step(seed),
    "step, next": lambda seed: at_step(seed, refresh="next"),
    "accumulate": lambda seed: at_step(seed, "accumulate"),
    "projected left": lambda seed: projected("left", llama(seed)),
    "projected right": lambda seed: projected("right", llama(seed), share=True),
    "some projected": lambda seed: some_projected(seed),
}


def at_step(seed, per_layer=None, **keys):
    model = llama(seed)
    return model, galore(model, per_layer, **keys)


def some_projected(seed):
    """The others accumulate."""
    model = project_model(llama(seed), 8, "right", target_modules=["self_attn"])
    return model, galore(model)


def found(model, optimizer, losses):
    return losses, weights(model), bases(optimizer)


def trained_by_ddp(rank, size):
    """{name: what a run in each mode has found}; ranks begin with weights of their own."""
    results = {}
    for name, make in MODES.items():
        for view in (False, True):
            model, optimizer = make(rank)
            ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
            losses = train(ddp, optimizer, STEPS, rank=rank, size=size, micro=2 if view else 1, clip=0.3)
            results[name, view] = found(model, optimizer, losses)
    return results


def test_ddp_trains_as_one_process_with_the_whole_batch():
    """Losses, weights and bases of all ranks; without and with micro-batches, clipped by torch."""
    size = 2
    ranks = world.run(size, trained_by_ddp, size)
    for (name, view), (_, first, first_bases) in ranks[0].items():
        model, optimizer = MODES[name](0)
        losses, ours, our_bases = found(model, optimizer, train(model, optimizer, STEPS, clip=0.3))
        mean = torch.tensor([one[name, view][0] for one in ranks]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(losses), **CLOSE, msg=lambda m: f"{name} {view}: {m}")
        assert_same(ours, first, **CLOSE)
        for other in ranks[1:]:
            assert_same(other[name, view][1], first)
            assert all(map(torch.equal, other[name, view][2], first_bases)), name
        assert len(first_bases) == len(our_bases) == 14
        for a, b in zip(our_bases, first_bases):
            assert (a.T @ b).square().sum() > 8 - 1e-3, name
