"""GaLoreAdamW with exact SVD follows galore_torch.GaLoreAdamW on a real model, freely and teacher-forced.

The peer's singular vectors come with arbitrary signs, so that it does not even follow itself under a perturbation of 1e-7:
its projector is wrapped with the package's sign rule. eps is tiny because the peer adds it before bias correction.
"""

import pytest
import torch

from lowrank_sys.optim import GaLoreAdafactor, GaLoreAdamW, param_groups
from lowrank_sys.subspace.iteration import canonical_signs

galore_torch = pytest.importorskip("galore_torch", reason="the peer galore-torch is not installed")
from galore_torch.galore_projector import GaLoreProjector  # noqa: E402

RANK, GAP, SCALE = 32, 20, 0.25


@pytest.fixture(autouse=True)
def peer_with_sign_rule(monkeypatch):
    original = GaLoreProjector.get_orthogonal_matrix

    def wrapped(self, weights, rank, type):
        matrix = original(self, weights, rank, type)
        old = self.ortho_matrix
        if type == "right":
            return canonical_signs(matrix.T, None if old is None else old.T).T.contiguous()
        return canonical_signs(matrix, old)

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", wrapped)


def groups(model, **keys):
    plain, low_rank = param_groups(model, rank=RANK, update_proj_gap=GAP, scale=SCALE, **keys)
    return plain, low_rank


def peer_groups(model):
    plain, low_rank = groups(model)
    return [
        {"params": [p for _, p in plain["params"]]},
        {"params": [p for _, p in low_rank["params"]], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"},
    ]


def peer_adamw(model, **hyper):
    return galore_torch.GaLoreAdamW(peer_groups(model), no_deprecation_warning=True, **hyper)


def force(pairs):
    """Hand the peer's weights and gradients to ours; returns the weights."""
    for (_, p), q in pairs:
        p.data.copy_(q.data)
        p.grad = q.grad.clone()
    return [q.detach().clone() for _, q in pairs]


def assert_same_update(pairs, before, tolerance, step):
    for ((name, p), q), w in zip(pairs, before):
        want = q.detach() - w
        # Both weights are stored in fp32: half a unit in the last place of each is no difference of the updates.
        rounding = torch.finfo(torch.float32).eps * w.norm()
        assert (p.detach() - w - want).norm() <= tolerance * want.norm() + rounding, (step, name)


def test_follows_the_peer_for_50_steps(llama, backward):
    hyper = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-30, "weight_decay": 0.0}
    ours, theirs = llama(), llama()
    optimizer, peer = GaLoreAdamW(groups(ours, subspace="svd"), **hyper), peer_adamw(theirs, **hyper)
    for step in range(50):
        assert backward(ours, step) == pytest.approx(backward(theirs, step), rel=1e-4)
        optimizer.step()
        peer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert ((p - q).norm() / q.norm()).item() < 1e-4, name


def test_teacher_forced(llama, backward):
    """Every step from the peer's own weights, moments, basis and gradient: the updates agree within 1e-5."""
    hyper = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-30, "weight_decay": 0.0}
    ours, theirs = llama(), llama()
    optimizer, peer = GaLoreAdamW(groups(ours, subspace="svd"), **hyper), peer_adamw(theirs, **hyper)
    pairs = list(zip(ours.named_parameters(), theirs.parameters()))
    for step in range(50):
        backward(theirs, step)
        before = force(pairs)
        for (_, p), q in pairs if step else ():
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key].copy_(peer.state[q][key])
        peer.step()
        if step:
            # The peer refreshes inside its step: hand its new basis over and keep ours from refreshing.
            for (_, p), q in pairs:
                if "basis" in optimizer.state[p]:
                    matrix = peer.state[q]["projector"].ortho_matrix
                    state = optimizer.state[p]
                    state["basis"].copy_(matrix if state["left"] else matrix.T)
                    state["countdown"].fill_(10)
        optimizer.step()
        assert_same_update(pairs, before, 1e-5, step)


@pytest.mark.parametrize(
    "options", [{}, {"lr": 1e-3, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1}], ids=["relative step", "first moment"]
)
def test_adafactor_teacher_forced(llama, backward, options):
    """The factored second moment divides by the smallest statistics, so free runs part: compare step by step."""
    ours, theirs = llama(), llama()
    optimizer = GaLoreAdafactor(groups(ours, subspace="svd"), **options)
    peer = galore_torch.GaLoreAdafactor(peer_groups(theirs), **options)
    pairs = list(zip(ours.named_parameters(), theirs.parameters()))
    for step in range(25):
        backward(theirs, step)
        before = force(pairs)
        optimizer.step()
        peer.step()
        assert_same_update(pairs, before, 1e-4, step)
