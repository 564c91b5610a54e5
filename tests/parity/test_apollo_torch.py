"""apollo_step against apollo-torch's APOLLOAdamW, teacher-forced: the same weights, gradients and basis at every step."""

import pytest
import torch

import lowrank_sys  # noqa: F401  registers the ops

apollo_torch = pytest.importorskip("apollo_torch")

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
        torch.ops.lowrank.apollo_step.list([ours], [theirs.grad], [basis], [exp_avg], [exp_avg_sq], [limiter], [step],
                                           lr=torch.tensor(lr), beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=0.0,
                                           scale=scale, left=left, per_tensor=scale_type == "tensor", scale_front=front)
        assert step == i + 1 == peer.state[theirs]["step"]
        # fp32 sums of 60 terms in another order, as parts of norms and of ratios.
        torch.testing.assert_close(exp_avg, peer.state[theirs]["exp_avg"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(limiter, peer.state[theirs]["scaled_grad"], rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-5 * lr * scale**0.5 * 30)
        limited += before > 0 and abs(limiter.item() / before - 1.01) < 1e-4
    assert limited, "the limiter never acted"
