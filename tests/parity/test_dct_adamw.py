"""DCTAdamW against the authors' (ista-daslab-optimizers), step for step on the same gradients, without and with error feedback.

Two things of theirs are mended here, in the test. Moments are rotated by a product that writes over what it reads. And their D is
made of cosines of large fp32 angles, so that its columns are orthogonal to 1e-6 only: of that size, times the moments of others, a
new column's moments begin, and where its first entries are small Adam's quotient of the two is another one. Here D is rounded once,
and theirs is in fp64.
"""

import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import nn

from lowrank_sys.optim import DCTAdamW

PACKAGE = "ista_daslab_optimizers"
LR, DECAY, RANK, STEPS = 1e-2, 0.1, 4, 20


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

        def exact(n, dtype, device):
            i = torch.arange(n, dtype=torch.float64)
            d = math.sqrt(2 / n) * (math.pi * (i[:, None] * (2 * i + 1) % (4 * n)) / (2 * n)).cos()
            d[0] *= math.sqrt(0.5)
            return d.to(dtype)

        patch.setattr(module.FFTLowRankProjector, "rotate_subspace", rotate_subspace)
        patch.setattr(module, "dct3_matrix", exact)
        yield module.DCTAdamW


def gradients(shape, steps):
    """Of which other columns of the DCT are the largest from step to step."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(shape, generator=generator)
    for _ in range(steps):
        drift = 0.8 * drift + torch.randn(shape, generator=generator)
        yield drift


@pytest.mark.parametrize("feedback", [False, True], ids=["dropped", "error feedback"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=["wide", "tall", "square"])
def test_steps_are_the_authors(peer, shape, feedback, capsys):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().double())
    options = {"proj": "dct", "sim_type": "makhoul", "rotate_subspace": True, "use_ef": feedback}
    other = peer([theirs], lr=LR, weight_decay=DECAY, rank=RANK, **options)
    optimizer = DCTAdamW([{"params": [ours], "rank": RANK}], lr=LR, weight_decay=DECAY, error_feedback=feedback)
    chosen = set()  # and weights of up to 3 are rounded to fp32 in each of 20 steps
    for step, gradient in enumerate(gradients(shape, STEPS)):
        theirs.grad, ours.grad = gradient.double(), gradient.clone()
        other.step()
        optimizer.step()
        columns = optimizer.state[ours]["columns"].sort().values
        found = other.state[theirs]["fft-low-rank-projector"].indices_crt.sort().values
        assert torch.equal(columns, found), step
        torch.testing.assert_close(ours.double(), theirs, atol=4e-6, rtol=0, msg=lambda m: f"step {step}: {m}")
        if feedback:
            torch.testing.assert_close(optimizer.state[ours]["error"].double(), other.state[theirs]["ef"], atol=1e-5, rtol=1e-5)
        chosen.add(tuple(columns.tolist()))
    assert len(chosen) > 1
