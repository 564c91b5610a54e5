"""GaLoreAdamW8bit beside galore_torch.GaLoreAdamW8bit, which runs bitsandbytes' AdamW8bit on the projected gradient.

Step by step from the peer's own state: bitsandbytes does not find the nearest code on the CPU, so free runs part.
"""

import pytest
import torch

from lowrank_sys.optim import GaLoreAdamW8bit, QGaLoreAdamW8bit, param_groups
from lowrank_sys.optim.bitsandbytes import from_bitsandbytes

galore_torch = pytest.importorskip("galore_torch", reason="the peer galore-torch is not installed")
pytest.importorskip("bitsandbytes", reason="the peer bitsandbytes is not installed")

RANK, GAP, SCALE, STEPS = 32, 4, 0.25, 12
HYPER = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture
def peer(monkeypatch):
    """Builds the peer's optimizer, whose step asks for a GPU where it has none."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def build(model):
        plain, low_rank = param_groups(model, rank=RANK)
        keys = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
        groups = [{"params": [p for _, p in plain["params"]]}, {"params": [p for _, p in low_rank["params"]], **keys}]
        return galore_torch.GaLoreAdamW8bit(groups, **HYPER)

    return build


def ours(cls, model, **keys):
    return cls(param_groups(model, rank=RANK, scale=SCALE, **keys), **HYPER)


def decoded(state):
    """A state whose codes are in flat blocks, with fp32 moments."""
    names = {"exp_avg": True, "exp_avg_sq": False}
    kept = {key: value for key, value in state.items() if not key.endswith("absmax")}
    if "exp_avg_absmax" in state:
        for name, signed in names.items():
            kept[name] = torch.ops.lowrank.dequantize_blockwise(state[name], state[f"{name}_absmax"], signed=signed)
    return kept


def test_teacher_forced(llama, backward, peer):
    """The peer's weights, codes, basis and gradient: updates agree within 1e-4, and states in bytes, layout and names.

    Its blocks of a low-rank gradient cross rows: matrices are handed the values of its codes, as both take the update from the
    moments before these are rounded.
    """
    mine, theirs = llama(), llama()
    optimizer, other = ours(GaLoreAdamW8bit, mine, subspace="svd", min_8bit_size=10**9), peer(theirs)
    pairs = list(zip(mine.named_parameters(), theirs.parameters()))
    coded = 0
    for step in range(STEPS):
        backward(theirs, step)
        for (_, p), q in pairs:
            p.data.copy_(q.data)
            p.grad = q.grad.clone()
            if step:
                converted = from_bitsandbytes(other.state[q])
                coded += "exp_avg_absmax" in converted
                converted = decoded(converted) if "basis" in optimizer.state[p] else converted
                assert converted.keys() == optimizer.state[p].keys() & converted.keys()
                for key, value in converted.items():
                    assert value.shape == optimizer.state[p][key].shape and value.dtype == optimizer.state[p][key].dtype
                    optimizer.state[p][key].copy_(value)
        before = [q.detach().clone() for _, q in pairs]
        other.step()
        if step:  # the peer refreshes inside its step: hand its new basis over and keep ours from refreshing
            for (_, p), q in pairs:
                state = optimizer.state[p]
                if "basis" in state:
                    matrix = other.state[q]["projector"].ortho_matrix
                    state["basis"].copy_(matrix if state["left"] else matrix.T)
                    state["countdown"].fill_(10)
        optimizer.step()
        for ((name, p), q), w in zip(pairs, before):
            want = q.detach() - w
            rounding = torch.finfo(torch.float32).eps * w.norm()
            if step:  # their first vectors have arbitrary signs, which the first update does not see
                assert (p.detach() - w - want).norm() <= 1e-4 * want.norm() + rounding, (step, name)
    assert coded > 5 * STEPS


def test_it_learns_as_the_peer_does(llama, backward, peer):
    """Free runs, where codes and subspaces part: the losses stay together, those of INT4 bases refreshed as often too."""
    model = llama()
    other = peer(model)
    losses = [[backward(model, step), other.step()][0] for step in range(60)]
    for cls in (GaLoreAdamW8bit, QGaLoreAdamW8bit):
        model = llama()
        optimizer = ours(cls, model, update_proj_gap=GAP, cos_threshold=None)
        got = [[backward(model, step), optimizer.step()][0] for step in range(60)]
        assert sum(got[-10:]) <= 1.02 * sum(losses[-10:]), cls.__name__
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
