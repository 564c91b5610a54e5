"""per_layer="accumulate": micro-batches add up to one batch, and the coefficients behave as parameters."""

import copy
import io
import math

import pytest
import torch
from projected_model import llama
from small_model import (
    CLOSE,
    EPS,
    LR,
    VOCAB,
    assert_same,
    backward,
    bases,
    build,
    clip_by_optimizer,
    clip_by_torch,
    coefficients,
    galore,
    groups,
    loss_of,
    tokens,
    train,
)
from torch import nn

from lowrank_sys.optim import Accumulate, GaLoreAdamW, param_groups

ops = torch.ops.lowrank


@pytest.mark.parametrize("keys", [{}, {"proj_type": "short-moments"}, {"moments": "rotate"}, {"moments": "reset"}], ids=str)
def test_four_micro_batches_are_one_batch(keys):
    """With torch's clipping in an ordinary loop, over several refreshes; and the same as on whole gradients."""
    one, four, whole = build(), build(), build()
    optimizers = [galore(one, **keys), galore(four, **keys), galore(whole, None, refresh="next", **keys)]
    start = [one[i].weight.detach().clone() for i in (1, 3)]
    norms = [
        train(one, optimizers[0], range(16), 1, clip_by_torch),
        train(four, optimizers[1], range(16), 4, clip_by_torch),
        train(whole, optimizers[2], range(16), 4, clip_by_optimizer),
    ]
    assert_same(one, four, **CLOSE)
    assert_same(one, whole, **CLOSE)
    for other in norms[1:]:
        torch.testing.assert_close(norms[0], other, atol=1e-5, rtol=1e-5)
    assert (norms[0] > 1).any()  # clipping took place
    for optimizer in optimizers[1:]:
        for ours, theirs in zip(bases(optimizers[0]), bases(optimizer)):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # perturbed by rounding over the gap of a Ritz value
    assert all((w - s).abs().max() > 100 * CLOSE["atol"] for w, s in zip((one[1].weight, one[3].weight), start))


def test_it_trains_as_well_as_whole_gradients():
    losses = {}
    for per_layer in (None, "accumulate"):
        model = build()
        train(model, galore(model, per_layer), range(40), 2)
        losses[per_layer] = loss_of(model, tokens(99)).item()
    assert losses["accumulate"] < 1.1 * losses[None] < 0.5 * math.log(VOCAB)


def test_the_norm_is_that_of_the_low_rank_gradients():
    model = build()
    optimizer = galore(model, None, refresh="next")
    train(model, optimizer, range(3))
    backward(model, 3)
    full = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    parts = []
    for p in model.parameters():
        state = optimizer.state[p]
        parts.append((ops.project(p.grad, state["basis"], left=state["left"]) if "basis" in state else p.grad).norm())
    before = model[1].weight.grad.clone()
    norm = optimizer.clip_grad_norm_(math.inf)
    torch.testing.assert_close(norm.float(), torch.stack(parts).norm())
    assert norm < full and torch.equal(model[1].weight.grad, before)
    with pytest.raises(ValueError, match="refresh='next'"):
        other = galore(model, None)
        other.clip_grad_norm_(1.0)


def sequences(count):
    ids = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def run_trainer(folder, per_layer, batch_size, accumulation, **keys):
    from transformers import Trainer, TrainingArguments

    model = llama(num_hidden_layers=1)
    optimizer = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=3, **keys), lr=LR, eps=EPS, per_layer=per_layer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        max_grad_norm=0.5,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=sequences(32), optimizers=(optimizer, None))
    trainer.train()
    return model, [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def test_transformers_trainer(tmp_path):
    one, norms_of_one = run_trainer(tmp_path, "accumulate", 4, 1)
    four, norms_of_four = run_trainer(tmp_path, "accumulate", 1, 4)
    assert norms_of_one == pytest.approx(norms_of_four, rel=1e-4) and max(norms_of_one) > 0.5
    assert_same(one, four, **CLOSE)
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in (one, llama(num_hidden_layers=1))]
    assert not torch.equal(*weights)

    # a checkpoint knows nothing of the coefficients
    from transformers import LlamaForCausalLM

    assert not any("low_rank_gradients" in key for key in four.state_dict())
    four.save_pretrained(tmp_path / "saved")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(four, loaded)
    four.load_state_dict(loaded.state_dict(), strict=True)


@pytest.mark.parametrize(
    "zero",
    [
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    ],
    ids=["model None", "model 0", "optimizer None", "optimizer 0"],
)
def test_zero_grad(zero):
    """Between the steps, and to throw a micro-batch away: the sketch goes with the gradient."""
    clean, model = build(), build()
    optimizers = [galore(clean, update_proj_gap=2), galore(model, update_proj_gap=2)]
    for step in range(8):
        backward(clean, step)
        backward(model, 100 + step)
        zero(model, optimizers[1])
        backward(model, step)
        for m, o in ((clean, optimizers[0]), (model, optimizers[1])):
            o.step()
            zero(m, o)
    assert_same(clean, model)


def test_a_forgotten_zero_grad_is_an_error():
    model = build()
    optimizer = galore(model)
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after step\(\)"):
        backward(model, 1)
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after step\(\)"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer.zero_grad()
    train(model, optimizer, [1])


def test_the_coefficient():
    """In parameters() and in the optimizer's groups, of one element, and in no checkpoint."""
    model = build()
    keys = list(model.state_dict())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = galore(model)
    found = coefficients(model)
    assert {name: tuple(p.shape) for name, p in found.items()} == {
        "1.low_rank_gradients.weight": (96, 16),
        "3.low_rank_gradients.weight": (16, 96),
    }
    for p in found.values():
        assert p.untyped_storage().nbytes() == 4 and not p.requires_grad and (p == 0).all()
        assert any(q is p for q in optimizer.param_groups[1]["params"])
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    full = 2 * 16 * 96 * 4
    assert optimizer.gradients.memory() == {"accumulators": full} and optimizer.state_bytes() == full
    backward(model, 0)
    grad = model[3].low_rank_gradients.weight.grad
    assert grad.dtype == torch.float32 and grad.shape == (16, 96)
    sketch = 24 * (48 + 96) * 4  # the first of the two matrices owes one: Omega and Y, 16 + 8 columns
    assert optimizer.gradients.memory() == {"accumulators": full + sketch}
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert torch.save(model, io.BytesIO()) is None and "1.low_rank_gradients.weight" not in copy.deepcopy(model).state_dict()


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to(torch.bfloat16), lambda m: m.double().float(), lambda m: m.share_memory()],
    ids=["bf16", "there and back", "shared"],
)
def test_a_model_that_is_moved_afterwards(move):
    model = build()
    optimizer = galore(model)
    move(model)
    train(model, optimizer, range(6), 2)
    for p in coefficients(model).values():
        assert p.dtype == torch.float32 and p.untyped_storage().nbytes() == 4
    backward(model, 6)
    assert model[1].low_rank_gradients.weight.grad.dtype == torch.float32
    assert not torch.equal(model[1].weight.float(), build()[1].weight)


def test_bf16_accumulators():
    """A sum of 4 is rounded 4 times, to 2^-9 of its size at most each: R differs by less than 1% of its norm."""
    models = [build(), build()]
    optimizers = [galore(models[0]), galore(models[1], Accumulate(torch.bfloat16))]
    for model in models:
        backward(model, 0, 4)
    for fp32, bf16 in zip(*(coefficients(m).values() for m in models)):
        assert bf16.grad.dtype == torch.bfloat16
        assert 0 < (fp32.grad - bf16.grad).norm() < 0.01 * fp32.grad.norm()
    assert optimizers[1].gradients.memory()["accumulators"] < optimizers[0].gradients.memory()["accumulators"]
    norms = [clip_by_torch(m, None) for m in models]
    torch.testing.assert_close(norms[0], norms[1].float(), atol=0, rtol=0.01)
    for model, optimizer in zip(models, optimizers):
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, range(1, 40), 2)
    losses = [loss_of(model, tokens(99)).item() for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_weight_that_is_unfrozen_later():
    model = build()
    made = groups(model)
    model[3].weight.requires_grad_(False)
    optimizer = GaLoreAdamW(made, lr=LR, per_layer="accumulate")
    before = model[3].weight.detach().clone()
    train(model, optimizer, [0])
    assert torch.equal(model[3].weight, before)
    model[3].weight.requires_grad_(True)
    train(model, optimizer, [1])
    assert not torch.equal(model[3].weight, before)


def test_a_gradient_that_is_put_there_by_hand():
    models = [build(), build()]
    optimizers = [galore(m) for m in models]
    torch.manual_seed(3)
    for p in models[0].parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    ids = [p for p in models[1].parameters() if p.requires_grad]
    sum((p * q.grad).sum() for p, q in zip(ids, (p for p in models[0].parameters() if p.requires_grad))).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*models)
    assert models[0][1].weight.grad is None


def test_first_sketches_are_spread():
    """Seeded bases at first; the first refreshes are spread over four steps, the next over the gap."""
    params = [nn.Parameter(torch.randn(12, 10)) for _ in range(8)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 2, "update_proj_gap": 8, "refresh": "next"}])
    history = []
    for _ in range(16):
        for p in params:
            p.grad = torch.randn_like(p)
        old = [optimizer.state[p]["basis"].clone() if optimizer.state[p] else None for p in params]
        optimizer.step()
        new = [optimizer.state[p]["basis"] for p in params]
        history.append([i for i in range(8) if old[i] is None or not torch.equal(old[i], new[i])])
        for p in params:
            basis = optimizer.state[p]["basis"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    assert history[1:4] == [[0, 2, 3], [1, 4, 5], [6, 7]]
    assert max(map(len, history[4:])) <= 2
    later = sum(history[8:16], [])
    assert sorted(later) == list(range(8))


def test_a_step_with_rate_0_is_no_refresh():
    """As checkpoint loaders take to create the state: the seeded basis stays, and its refresh stays due."""
    model = build()
    optimizer = galore(model, lr=0.0)
    backward(model, 0)
    seeded = bases(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(seeded[0], bases(optimizer)[0])
    for group in optimizer.param_groups:
        group["lr"] = LR
    train(model, optimizer, [1])
    assert not torch.equal(seeded[0], bases(optimizer)[0])
