"""DCTAdamW against the authors' (ista-daslab-optimizers), step for step on the same gradients.

Theirs rotates moments by a product that writes over what it reads: mended here, in the test.
"""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from lowrank_sys.optim import DCTAdamW

PACKAGE = "ista_daslab_optimizers"
LR, DECAY, RANK = 1e-2, 0.1, 4


@pytest.fixture(scope="module")
def peer():
    """Their class. The package itself imports modules of CUDA; the optimizer needs none of them."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        pytest.skip("the peer ista-daslab-optimizers is not installed")
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType(PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        patch.setitem(sys.modules, PACKAGE, package)
        module = importlib.import_module(f"{PACKAGE}.fft_low_rank.dct_adamw")

        def rotate_subspace(self, rotation, moment):
            moment.copy_(moment @ rotation if self.is_right_proj else rotation @ moment)

        patch.setattr(module.FFTLowRankProjector, "rotate_subspace", rotate_subspace)
        yield module.DCTAdamW


def gradients(shape, steps):
    """Of which other columns of the DCT are the largest from step to step."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(shape, generator=generator)
    for _ in range(steps):
        drift = 0.8 * drift + torch.randn(shape, generator=generator)
        yield drift


@pytest.mark.parametrize("shape, steps", [((12, 20), 8), ((20, 12), 3), ((12, 12), 3)], ids=["wide", "tall", "square"])
def test_steps_are_the_authors(peer, shape, steps, capsys):
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(shape))
    ours = nn.Parameter(theirs.detach().clone())
    options = {"proj": "dct", "sim_type": "makhoul", "rotate_subspace": True}
    other = peer([theirs], lr=LR, weight_decay=DECAY, rank=RANK, **options)
    optimizer = DCTAdamW([{"params": [ours], "rank": RANK}], lr=LR, weight_decay=DECAY)
    chosen = set()
    for step, gradient in enumerate(gradients(shape, steps)):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        other.step()
        optimizer.step()
        columns = optimizer.state[ours]["columns"].sort().values
        found = other.state[theirs]["fft-low-rank-projector"].indices_crt.sort().values
        assert torch.equal(columns, found), step
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=1e-5, msg=lambda m: f"step {step}: {m}")
        chosen.add(tuple(columns.tolist()))
    assert len(chosen) > 1
