"""What one method promises alone."""

import pytest
import torch
from methods.inputs import COMMON, LR, gradients
from torch import nn

from lowrank_sys import optim
from lowrank_sys.optim import SCALE, LDAdamW, Muon, SinkGD, fused
from lowrank_sys.optim.preset import METHODS


def lone(cls, keys, dtype=torch.float32, **arguments):
    """(a matrix, its optimizer)."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 12).to(dtype))
    return matrix, cls([{"params": [matrix], **keys}], **{**COMMON, **arguments})


@pytest.mark.parametrize("tiny, large", [(1e-30, 1.0), (1e-20, 1e18), (1e-8, 1e15)])
def test_sinkgd_brings_every_row_to_one_norm_however_small(tiny, large):
    matrix, optimizer = lone(SinkGD, {"rank": None}, weight_decay=0.0)
    g = torch.randn(8, 12)
    g[2] *= tiny
    g[3] *= large
    g[5] = 0
    before, matrix.grad = matrix.detach().clone(), g
    optimizer.step()
    rows = ((before - matrix) / LR).norm(dim=1)
    assert rows[5] == 0 and matrix.isfinite().all()
    torch.testing.assert_close(rows[[2, 3]], torch.full((2,), 12**0.5), atol=0.5, rtol=0)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_ldadam_loses_nothing_of_a_gradient(left):
    """With betas of 0 what the basis left out, and only that, is in the error."""
    matrix, optimizer = lone(LDAdamW, {"rank": 3, "proj_type": "left" if left else "right"}, betas=(0.0, 0.99))
    seen, projected = torch.zeros(8, 12), torch.zeros(8, 12)
    for g in gradients((8, 12)):
        matrix.grad = g
        optimizer.step()
        state = optimizer.state[matrix]
        r, b = state["exp_avg"], state["basis"]  # with beta1 = 0 the moment is R
        seen, projected = seen + g, projected + (b @ r if left else r @ b.T)
        torch.testing.assert_close(state["error"], seen - projected, atol=1e-4, rtol=0)


def test_ldadam_s_error_in_bf16_is_rounded_once_a_sum():
    """A few roundings of what it adds up, where it is much smaller than the moment that it is corrected by."""
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix, optimizer = lone(LDAdamW, {"rank": 3, "proj_type": "left"}, dtype)
        for g in gradients((8, 12)):
            matrix.grad = g.to(dtype)
            optimizer.step()
        errors.append(optimizer.state[matrix]["error"].float())
    assert optimizer.state[matrix]["error"].dtype == torch.float32
    assert (errors[0] - errors[1]).norm() < 0.1 * errors[1].norm()


def test_clipping_by_the_optimizer_takes_whole_matrices_too():
    matrix = nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([{"params": [matrix], "rank": None}])
    matrix.grad = torch.full((8, 12), 2.0)
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(2 * 96**0.5)
    assert matrix.grad.norm() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "a tied head"])
def test_scale_s_groups(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    groups = METHODS["scale"].groups(model, plain={"lr": 1e-2}, seed=3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert sorted(name for group in names for name in group) == sorted(name for name, _ in model.named_parameters())
    vectors, matrices, *heads = names
    assert all("norm" in name for name in vectors) and len(matrices) == 7 and groups[0]["lr"] == 1e-2
    assert heads == ([["model.embed_tokens.weight"]] if tied else [["model.embed_tokens.weight"], ["lm_head.weight"]])
    assert groups[-1]["momentum"] == 0.9 and groups[-1].get("over", "rows") == "rows"
    assert tied or groups[2]["over"] == "columns"
    optimizer = SCALE(groups)
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    assert [p.shape for p in model.parameters() if p.dim() == 2 and "exp_avg" in optimizer.state[p]] == [(40, 16)]


@pytest.mark.parametrize("general", [False, True], ids=["fused", "general"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_fira_measures_what_a_basis_that_is_not_orthonormal_leaves(left, general, monkeypatch):
    if general:
        monkeypatch.setattr(fused, "fused", lambda batch: None)
    param = nn.Parameter(torch.zeros(24, 36))
    keys = {"rank": 4, "subspace": "coap", "proj_type": "left" if left else "right", "alpha": 0.5}
    optimizer = optim.FiraAdamW([{"params": [param], **keys}], lr=1e-2)
    optimizer.make_states([param])
    state, g = optimizer.state[param], torch.randn(24, 36, generator=torch.Generator().manual_seed(0))
    state["basis"].copy_(torch.randn(24 if left else 36, 4, generator=torch.Generator().manual_seed(1)))
    state["countdown"].fill_(9)
    param.grad = g.clone()
    optimizer.step()
    b, g = state["basis"].double(), g.double()
    r = b.T @ g if left else g @ b
    n, axis = 0.1 * r / ((0.001 * r * r).sqrt() + 1e-6), 0 if left else 1
    s = n.norm(dim=axis, keepdim=True) / r.norm(dim=axis, keepdim=True)
    rest = s * (g - 0.5 * (b @ r if left else r @ b.T))
    assert torch.allclose(state["limiter"].double(), rest.norm(), rtol=1e-4)
