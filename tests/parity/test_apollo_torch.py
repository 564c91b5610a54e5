"""apollo_step against apollo-torch's APOLLOAdamW, teacher-forced: the same weights, gradients and basis at every step.
APOLLOAdamW against it on a real model, freely: singular vectors with the package's sign rule, or the same Gaussian bases."""

import pytest
import torch

from lowrank_sys.optim import APOLLOAdamW, param_groups
from lowrank_sys.reference.gaussian import gaussian_basis
from lowrank_sys.subspace.iteration import canonical_signs

apollo_torch = pytest.importorskip("apollo_torch", reason="the peer apollo-torch is not installed")

SIDES = pytest.mark.parametrize("shape", [(40, 60), (60, 40), (48, 48)], ids=str)


@SIDES
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("scale_type, scale", [("channel", 1.0), ("tensor", 16.0)])
@pytest.mark.parametrize("front", [False, True])
def test_teacher_forced(shape, proj, scale_type, scale, front):
    # The peer decays after the update, on the new weights: compared without decay.
    m, n = shape
    lr, betas, eps, r = 1e-2, (0.9, 0.999), 1e-6, 1 if scale_type == "tensor" else 8
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(m, n))
    group = dict(params=[theirs], rank=r, proj=proj, scale_type=scale_type, scale=scale, update_proj_gap=4, proj_type="std")
    peer = apollo_torch.APOLLOAdamW([group], lr=lr, betas=betas, eps=eps, weight_decay=0.0, scale_front=front)
    left = m < n  # the peer's "std" projects the short side, a square from the right
    low = (r, n) if left else (m, r)
    exp_avg, exp_avg_sq, limiter, step = torch.zeros(low), torch.zeros(low), torch.zeros(()), torch.tensor(0.0)
    limited = 0
    for i in range(10):
        theirs.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(i)) * (30 if i in (3, 7) else 1)
        ours, before = theirs.detach().clone(), limiter.item()
        peer.step()
        matrix = peer.state[theirs]["projector"].ortho_matrix
        basis = (matrix if left else matrix.T).contiguous()
        torch.ops.lowrank.apollo_step.list(
            [ours],
            [theirs.grad],
            [basis],
            [exp_avg],
            [exp_avg_sq],
            [limiter],
            [step],
            lr=torch.tensor(lr),
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=0.0,
            scale=scale,
            left=left,
            per_tensor=scale_type == "tensor",
            scale_front=front,
        )
        assert step == i + 1 == peer.state[theirs]["step"]
        # fp32 sums of 60 terms in another order, as parts of norms and of ratios.
        torch.testing.assert_close(exp_avg, peer.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(limiter, peer.state[theirs]["scaled_grad"], rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-5 * lr * scale**0.5 * 30)
        limited += before > 0 and abs(limiter.item() / before - 1.01) < 1e-4
    assert limited, "the limiter never acted"


def shared_singular_vectors(monkeypatch):
    from apollo_torch.svd_projector import GaLoreProjector

    original = GaLoreProjector.get_orthogonal_matrix

    def signed(self, weights, rank, type):
        matrix, old = original(self, weights, rank, type), self.ortho_matrix
        if type == "right":
            return canonical_signs(matrix.T, None if old is None else old.T).T.contiguous()
        return canonical_signs(matrix, old)

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", signed)


def shared_gaussians(monkeypatch, plain):
    """The peer numbers parameters from 1; `plain` of them come before the matrices."""
    from apollo_torch.random_projector import GradientProjector

    def ours(self, weights, rank, type, seed):
        if not hasattr(self, "refreshes"):
            self.first_seed, self.refreshes = seed, 0
        d = weights.shape[1 if type == "right" else 0]
        basis = gaussian_basis(d, rank, seed=0, step=self.refreshes, parameter=self.first_seed - plain - 1)
        self.refreshes += 1
        return basis.T.contiguous() if type == "right" else basis

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", ours)


@pytest.mark.parametrize("proj", ["svd", "random"])
@pytest.mark.parametrize("options", [dict(rank=32, scale=4.0), dict(rank=1, scale_type="tensor")], ids=["channel", "mini"])
def test_follows_the_peer_for_20_steps(llama, backward, monkeypatch, proj, options):
    # eps is tiny because the peer adds it before bias correction in plain parameters.
    hyper = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-30, "weight_decay": 0.0}
    options = {"scale_type": "channel", "update_proj_gap": 10, **options}
    ours, theirs = llama(), llama()
    groups = param_groups(ours, proj=proj, subspace="svd", **options)
    optimizer = APOLLOAdamW(groups, **hyper)
    shared = ("rank", "update_proj_gap", "scale", "proj_type", "proj", "scale_type")
    keys = {key: optimizer.param_groups[1][key] for key in shared}
    plain, low_rank = param_groups(theirs)
    shared_singular_vectors(monkeypatch)
    shared_gaussians(monkeypatch, len(plain["params"]))
    peer = apollo_torch.APOLLOAdamW(
        [{"params": [p for _, p in plain["params"]]}, {"params": [p for _, p in low_rank["params"]], **keys}], **hyper
    )
    for step in range(20):
        assert backward(ours, step) == pytest.approx(backward(theirs, step), rel=1e-4)
        optimizer.step()
        peer.step()
    limited = [optimizer.state[p]["limiter"].item() for p in optimizer.param_groups[1]["params"]]
    assert limited == pytest.approx([peer.state[q]["scaled_grad"].item() for _, q in low_rank["params"]], rel=1e-3)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert ((p - q).norm() / q.norm()).item() < 1e-4, name
