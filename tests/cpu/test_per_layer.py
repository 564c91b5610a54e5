"""per_layer: gradients that are projected, or used up, as soon as they exist, against the optimizer on whole gradients."""

import argparse
import copy
import gc
import io
import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank_sys import cli
from lowrank_sys.optim import Accumulate, GaLoreAdafactor, GaLoreAdamW, InBackward, param_groups

ops = torch.ops.lowrank
VOCAB, TOKENS, GAP = 50, 128, 4
LR = 1e-2
# Adam divides by |g| + eps: with an eps far above the gradients' rounding errors (about 1e-9), those stay what they are.
# With 1e-8 an entry that is zero but for rounding would move its weight by a full step, either way.
EPS = 1e-3
# Two orders of summation of the same numbers differ by about 1e-9 in R, by lr * 1e-9 / eps in a weight a step, and by one
# rounding of the weight (below 1) itself a step: far below this over 16 steps.
CLOSE = {"atol": 1e-5, "rtol": 0}


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48), nn.LayerNorm(48))
    model.add_module("head", nn.Linear(48, VOCAB))
    return model.to(dtype)


def groups(model, **keys):
    return param_groups(model, rank=16, **{"update_proj_gap": GAP, **keys})


def galore(model, per_layer="accumulate", nonfinite="skip", lr=LR, **keys):
    return GaLoreAdamW(groups(model, **keys), lr=lr, eps=EPS, weight_decay=0.1, per_layer=per_layer, nonfinite=nonfinite)


def tokens(step):
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids).float(), ids)


def backward(model, step, micro=1):
    for part in tokens(step).chunk(micro):
        (loss_of(model, part) / micro).backward()


def train(model, optimizer, steps, micro=1, clip=None):
    """Returns the norms before clipping."""
    norms = []
    for step in steps:
        backward(model, step, micro)
        if clip is not None:
            norms.append(clip(model, optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor([float(norm) for norm in norms])


def clip_by_torch(model, optimizer):
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_by_optimizer(model, optimizer):
    return optimizer.clip_grad_norm_(1.0)


def assert_same(a, b, **close):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(p, q, **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{name}: {m}")


def bases(optimizer):
    return [optimizer.state[p]["basis"].clone() for p in optimizer.param_groups[1]["params"] if "basis" in optimizer.state[p]]


def coefficients(model):
    return {name: p for name, p in model.named_parameters() if "low_rank_gradients" in name}


@pytest.mark.parametrize("keys", [{}, {"proj_type": "short-moments"}, {"moments": "rotate"}, {"moments": "reset"}], ids=str)
def test_four_micro_batches_are_one_batch(keys):
    """With torch's clipping in an ordinary loop, over several refreshes; and the same as on whole gradients."""
    one, four, whole = build(), build(), build()
    optimizers = [galore(one, **keys), galore(four, **keys), galore(whole, None, refresh="next", **keys)]
    start = [one[i].weight.detach().clone() for i in (1, 3)]
    norms = [train(one, optimizers[0], range(16), 1, clip_by_torch), train(four, optimizers[1], range(16), 4, clip_by_torch),
             train(whole, optimizers[2], range(16), 4, clip_by_optimizer)]
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


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                        vocab_size=64, use_cache=False))


def sequences(count):
    ids = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def run_trainer(folder, per_layer, batch_size, accumulation, **keys):
    from transformers import Trainer, TrainingArguments

    model = llama()
    optimizer = GaLoreAdamW(param_groups(model, rank=8, update_proj_gap=3, **keys), lr=LR, eps=EPS, per_layer=per_layer)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=batch_size, use_cpu=True, max_grad_norm=0.5,
        gradient_accumulation_steps=accumulation, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1)
    trainer = Trainer(model, arguments, train_dataset=sequences(32), optimizers=(optimizer, None))
    trainer.train()
    return model, [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def test_transformers_trainer(tmp_path):
    one, norms_of_one = run_trainer(tmp_path, "accumulate", 4, 1)
    four, norms_of_four = run_trainer(tmp_path, "accumulate", 1, 4)
    assert norms_of_one == pytest.approx(norms_of_four, rel=1e-4) and max(norms_of_one) > 0.5
    assert_same(one, four, **CLOSE)
    assert not torch.equal(one.model.layers[0].self_attn.q_proj.weight, llama().model.layers[0].self_attn.q_proj.weight)

    # a checkpoint knows nothing of the coefficients
    from transformers import LlamaForCausalLM

    assert not any("low_rank_gradients" in key for key in four.state_dict())
    four.save_pretrained(tmp_path / "saved")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(four, loaded)
    four.load_state_dict(loaded.state_dict(), strict=True)


class DenseTensorsAlive(TorchDispatchMode):
    """The most tensors of a matrix's size that were alive at once, weights left out."""

    def __init__(self, shape, weights):
        super().__init__()
        self.numel = math.prod(shape)
        self.weights = {w.data_ptr() for w in weights}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() == self.numel and tensor.data_ptr() not in self.weights:
                ref = StorageWeakRef(tensor.untyped_storage())
                self.alive[ref.cdata] = ref
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("per_layer, most", [("accumulate", 1), ("in_backward", 1), (None, 4)])
def test_one_dense_gradient_is_alive_at_a_time(per_layer, most):
    """Through backward and step; with whole gradients there are as many as matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 24), *(m for _ in range(2) for m in (nn.Linear(24, 40, bias=False), nn.Tanh(),
                          nn.Linear(40, 24, bias=False), nn.Tanh())), nn.Linear(24, VOCAB))
    optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules=["1", "3", "5", "7"], update_proj_gap=3), lr=LR,
                            per_layer=per_layer)
    matrices = [model[i].weight for i in (1, 3, 5, 7)]
    for step in range(6):
        loss = loss_of(model, tokens(step))
        with DenseTensorsAlive((40, 24), matrices) as tensors:
            loss.backward()
            assert per_layer is None or all(w.grad is None for w in matrices)
            optimizer.step()
        assert tensors.most == most
        optimizer.zero_grad()


MODES = {"accumulate": lambda: "accumulate", "bf16 accumulators": lambda: Accumulate(torch.bfloat16),
         "in_backward": lambda: "in_backward", "in_backward clipped": lambda: InBackward(max_norm=0.5)}
EACH = pytest.mark.parametrize("mode", MODES)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_is_exact(mode, dtype):
    """After 6 steps: the matrices are in the middle of a gap, between two windows."""
    micro = 2 if "accum" in mode else 1
    model = build(dtype)
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(6), micro)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(dtype)
    other = galore(resumed, MODES[mode]())
    backward(resumed, 50)  # a window in progress is dropped
    resumed.load_state_dict(saved["model"], strict=True)
    other.load_state_dict(saved["optimizer"])
    assert all(p.grad is None for p in coefficients(resumed).values())
    resumed.zero_grad()  # the plain gradients, as after any load
    train(model, optimizer, range(6, 15), micro)
    train(resumed, other, range(6, 15), micro)
    assert_same(model, resumed)


@EACH
def test_state_is_tensors_and_plain_numbers(mode):
    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        assert all(isinstance(value, (torch.Tensor, bool, int)) for value in state.values())
    assert len(optimizer.state) == len(model.state_dict())


def test_checkpoints_are_the_same_in_every_mode():
    """Accumulated, then on whole gradients, then accumulated: the same as throughout."""
    model, moved = build(), build()
    optimizer = galore(model)
    train(model, optimizer, range(12))
    states = None
    for steps, per_layer in ((range(5), "accumulate"), (range(5, 9), None), (range(9, 12), "accumulate")):
        other = galore(moved, per_layer)
        if states is not None:
            other.load_state_dict(states)
        train(moved, other, steps)
        states = other.state_dict()
    assert_same(model, moved, **CLOSE)
    assert [len(g["params"]) for g in states["param_groups"]] == [7, 2]
    assert states["param_groups"][1]["param_names"] == ["1.weight", "3.weight"]


def test_a_checkpoint_of_the_usual_schedule_goes_on_accumulating():
    model = build()
    optimizer = galore(model, None)
    train(model, optimizer, range(5))
    other = galore(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("refresh", None)  # as before the key existed
    other.load_state_dict(state)
    before = bases(other)
    assert other.param_groups[1]["refresh"] == "next"
    train(model, other, range(5, 5 + GAP), 2)
    assert all(not torch.equal(b, n) for b, n in zip(before, bases(other)))


def test_a_checkpoint_of_exact_bases_is_refused():
    model = build()
    optimizer = galore(model, None, subspace="svd")
    train(model, optimizer, range(2))
    other = galore(build())
    with pytest.raises(ValueError, match="a state with subspace='svd' cannot go on with per_layer='accumulate'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@EACH
def test_dcp_round_trip(mode):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = build()
    resumed.load_state_dict(model.state_dict())
    fresh = galore(resumed, MODES[mode]())
    set_optimizer_state_dict(resumed, fresh, saved)
    for m, o in ((model, optimizer), (resumed, fresh)):
        train(m, o, range(5, 12))
    assert_same(model, resumed)


@EACH
def test_a_copy_goes_on_alike(mode):
    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, range(3, 9))
    assert_same(model, twin)
    assert not torch.equal(model[1].weight, build()[1].weight)


def test_grad_scaler():
    """Unscaled by the caller, or inside the step, it is the step without a scaler; an overflow is a no-op."""
    models = [build() for _ in range(3)]
    optimizers = [galore(m) for m in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in models]
    for step in range(6):
        backward(models[0], step, 2)
        optimizers[0].step()
        optimizers[0].zero_grad()
        for model, optimizer, scaler, unscale in list(zip(models, optimizers, scalers, (None, True, False)))[1:]:
            for part in tokens(step).chunk(2):
                scaler.scale(loss_of(model, part) / 2).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for model in models[1:]:
        assert_same(models[0], model, **CLOSE)

    model, optimizer, scaler = models[2], optimizers[2], scalers[2]
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaler.scale(loss_of(model, tokens(0)) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for i, now in optimizer.state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq", "step", "basis"):
            assert key not in now or torch.equal(now[key], state[i][key])


def poison(param, index):
    def hook(grad):
        grad = grad.clone()
        grad[index] = math.nan
        return grad

    return param.register_hook(hook)


@pytest.mark.parametrize("per_layer", ["accumulate", "in_backward"])
def test_a_nan_stays_in_its_channel_and_keeps_the_basis(per_layer):
    model = build()
    optimizer = galore(model, per_layer, update_proj_gap=1)
    train(model, optimizer, range(5))
    before, old = model[1].weight.detach().clone(), bases(optimizer)
    handle = poison(model[1].weight, (5, 7))
    backward(model, 5)
    handle.remove()
    if per_layer == "accumulate":
        backward(model, 6)  # a good micro-batch does not make it good
    optimizer.step()
    optimizer.zero_grad()
    changed = (model[1].weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [i for i in range(96) if i != 5]  # (96, 48): projected on the right
    assert optimizer.skipped() == 48
    assert torch.equal(bases(optimizer)[0], old[0]) and not torch.equal(bases(optimizer)[1], old[1])
    train(model, optimizer, [7])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("per_layer", ["accumulate", "in_backward"])
def test_nonfinite_raise_names_the_weight(per_layer):
    model = build()
    optimizer = galore(model, per_layer, nonfinite="raise")
    poison(model[1].weight, (5, 7))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="the gradient of 1.weight is not finite"):
        backward(model, 0)
        optimizer.step()
    assert torch.equal(model[1].weight, before["1.weight"]) and torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("zero", [
    lambda model, optimizer: model.zero_grad(), lambda model, optimizer: model.zero_grad(set_to_none=False),
    lambda model, optimizer: optimizer.zero_grad(), lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
], ids=["model None", "model 0", "optimizer None", "optimizer 0"])
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


@EACH
def test_a_matrix_without_a_gradient_is_left_alone(mode):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.both, self.one, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, wide):
            x = self.both(x)
            return self.out(self.one(x) if wide else x)

    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    narrow = Branch()
    optimizer = GaLoreAdamW(param_groups(narrow, rank=4, update_proj_gap=2), lr=LR, weight_decay=0.1, per_layer=MODES[mode]())
    for step, wide in enumerate((True, False, False, True)):
        before = narrow.one.weight.detach().clone()
        countdown = optimizer.state[narrow.one.weight].get("countdown", torch.tensor(0)).clone()
        narrow(x, wide).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(narrow.one.weight, before) != wide
        if not wide:
            assert torch.equal(optimizer.state[narrow.one.weight]["countdown"], countdown)


class Shared(nn.Module):
    """One weight in two layers; `how` each block is checkpointed."""

    def __init__(self, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second, self.third = nn.Embedding(VOCAB, 24), *(nn.Linear(24, 24) for _ in range(3))
        self.second.weight = self.first.weight
        self.head = nn.Linear(24, VOCAB)
        self.how = how

    def forward(self, ids):
        x = self.embed(ids)
        for block in (self.first, self.second, self.third):
            x = x + (torch.tanh(block(x)) if self.how is None else checkpoint(
                lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=self.how == "reentrant"))
        return self.head(x)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_a_shared_weight_and_activation_checkpointing(how):
    dense, model = Shared(), Shared(how)
    optimizers = [galore(dense, None, refresh="next"), galore(model)]
    train(dense, optimizers[0], range(10))
    train(model, optimizers[1], range(10), 2)
    assert len(coefficients(model)) == 2
    assert_same(dense, model, **CLOSE)


def test_tied_embeddings_stay_plain():
    model = build()
    model[3] = nn.Linear(48, VOCAB)
    model[3].weight = model[0].weight
    model[1] = nn.Linear(48, 48)
    del model[5], model[4]
    optimizer = galore(model)
    assert list(coefficients(model)) == ["1.low_rank_gradients.weight"]
    backward(model, 0)
    assert model[0].weight.grad is not None and model[1].weight.grad is None
    optimizer.step()


def test_the_coefficient():
    """In parameters() and in the optimizer's groups, of one element, and in no checkpoint."""
    model = build()
    keys = list(model.state_dict())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = galore(model)
    found = coefficients(model)
    assert {name: tuple(p.shape) for name, p in found.items()} == {
        "1.low_rank_gradients.weight": (96, 16), "3.low_rank_gradients.weight": (16, 96)}
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


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.double().float(), lambda m: m.share_memory()],
                         ids=["bf16", "there and back", "shared"])
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


def test_the_newest_optimizer_of_a_weight_serves_it():
    model = build()
    first = galore(model)
    second = GaLoreAdamW(param_groups(model, rank=8), lr=LR, per_layer="accumulate")
    assert {tuple(p.shape) for p in coefficients(model).values()} == {(96, 8), (8, 96)}
    train(model, second, range(2))
    backward(model, 2)
    with pytest.raises(RuntimeError, match="a newer optimizer was built for them"):
        first.step()
    third = galore(model, None)
    assert not coefficients(model)
    model.zero_grad()
    backward(model, 3)
    assert model[1].weight.grad is not None
    third.step()


def test_release_and_an_optimizer_that_is_gone():
    for end in ("release", "collected"):
        model = build()
        optimizer = galore(model)
        train(model, optimizer, range(2))
        if end == "release":
            optimizer.release()
            assert not coefficients(model) and len(optimizer.param_groups[1]["params"]) == 2
            assert model._ddp_params_and_buffers_to_ignore == [] and not hasattr(model[1], "low_rank_gradients")
            with pytest.raises(RuntimeError, match="it was released"):
                optimizer.step()
        else:
            del optimizer
            gc.collect()
        backward(model, 2)
        assert model[1].weight.grad is not None, end


@EACH
def test_nothing_is_kept_alive(mode):
    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(2))
    backward(model, 2)
    refs = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[1].weight)]
    del model, optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


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


# in_backward


@pytest.mark.parametrize("keys", [{}, {"subspace": "svd"}, {"refresh": "next"}, {"moments": "rotate"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_in_backward_is_the_ordinary_step(keys, dtype):
    dense, model = build(dtype), build(dtype)
    train(dense, galore(dense, None, **keys), range(12))
    train(model, galore(model, "in_backward", **keys), range(12))
    assert_same(dense, model)


def test_adafactor_in_backward():
    dense, model = build(), build()
    for m, per_layer in ((dense, None), (model, "in_backward")):
        train(m, GaLoreAdafactor(groups(m), per_layer=per_layer), range(8))
    assert_same(dense, model)
    clipped = build()
    train(clipped, GaLoreAdafactor(groups(clipped), per_layer=InBackward(max_norm=0.5)), range(8))
    assert all(p.isfinite().all() for p in clipped.parameters())


def test_in_backward_clips_by_the_norm_of_the_previous_step():
    dense, model = build(), build()
    reference = galore(dense, None, refresh="next")
    optimizer = galore(model, InBackward(max_norm=0.5), refresh="next")
    previous = 0.0
    for step in range(10):
        backward(dense, step)
        norm = reference.clip_grad_norm_(math.inf).item()
        for p in dense.parameters():
            p.grad *= min(1.0, 0.5 / (previous + 1e-6))
        previous = norm
        reference.step()
        reference.zero_grad()
        train(model, optimizer, [step])
    assert previous > 0.5
    assert_same(dense, model, **CLOSE)
    unclipped = build()
    train(unclipped, galore(unclipped, "in_backward", refresh="next"), range(10))
    assert not torch.allclose(unclipped[1].weight, model[1].weight, atol=1e-4)


def test_in_backward_refuses_accumulation():
    model = build()
    optimizer = galore(model, "in_backward")
    backward(model, 0)
    after = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"a second backward before step\(\).*use per_layer='accumulate'"):
        backward(model, 1)
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())
    assert model[1].weight.grad is None
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    backward(model, 3)
    optimizer.step()


def test_in_backward_refuses_a_grad_scaler():
    for unscale in (False, True):
        model = build()
        optimizer = galore(model, "in_backward")
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, tokens(0))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        head = model.head.weight.detach().clone()
        with pytest.raises(RuntimeError, match="takes no GradScaler"):
            scaler.step(optimizer)
        assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match=r"InBackward\(max_norm=...\)"):
        optimizer.clip_grad_norm_(1.0)


# arguments


@pytest.mark.parametrize("per_layer, keys, message", [
    ("backward", {}, "per_layer must be None, accumulate, in_backward, an Accumulate or an InBackward, got 'backward'"),
    ("accumulate", {"refresh": "now"}, "refresh must be 'next' with per_layer='accumulate', got 'now'"),
    ("accumulate", {"subspace": "svd"}, "subspace must be randomized with refresh='next', got 'svd'"),
    (None, {"refresh": "later"}, "refresh must be one of now, next, got 'later'"),
])
def test_bad_arguments(per_layer, keys, message):
    with pytest.raises(ValueError, match=message):
        galore(build(), per_layer, **keys)


def test_more_bad_arguments():
    model = build()
    with pytest.raises(ValueError, match="needs a rule that can start from R, got GaLoreAdafactor"):
        GaLoreAdafactor(groups(model), per_layer="accumulate")
    with pytest.raises(ValueError, match=r"needs the model: give the groups of param_groups\(model\) as they are"):
        GaLoreAdamW(list(groups(model)), per_layer="accumulate")
    with pytest.raises(ValueError, match="1.weight is not a parameter of the model"):
        GaLoreAdamW(groups(model), per_layer=Accumulate(model=nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got torch.float16"):
        Accumulate(torch.float16)
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        InBackward(max_norm=0)
    part = Accumulate(model=model)
    optimizer = GaLoreAdamW(list(groups(model)), per_layer=part)
    with pytest.raises(ValueError, match="serves one optimizer"):
        GaLoreAdamW(groups(model), per_layer=part)
    train(model, optimizer, [0])


@EACH
def test_several_processes_are_refused(mode, monkeypatch):
    model = build()
    late = galore(model, MODES[mode]())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    other = build()
    with pytest.raises(RuntimeError, match="per_layer runs in one process, got 2"):
        galore(other, MODES[mode]())
    assert not coefficients(other)
    with pytest.raises(RuntimeError, match="per_layer runs in one process, got 2"):
        backward(model, 0)
    assert late is not None


def test_ddp_with_one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, model = build(), build()
        optimizers = [galore(plain), galore(model)]
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(plain, optimizers[0], range(6), 2, clip_by_torch)
        train(wrapped, optimizers[1], range(6), 2, clip_by_torch)
        assert_same(plain, model)
    finally:
        dist.destroy_process_group()


# ops


def arguments_of_refresh(left, waits=(0, -1, -3, 2), **changes):
    m, n, r = 12, 20, 4
    count = len(waits)
    made = [torch.linalg.qr(torch.randn(m if left else n, r))[0].contiguous() for _ in range(count)]
    sketches = [torch.randn((m, 12) if left else (12, n)) if wait in (0, -1) else torch.empty(0) for wait in waits]
    shape = (r, n) if left else (m, r)
    lists = [made, sketches, [torch.tensor(w) for w in waits], *([torch.rand(shape) for _ in waits] for _ in range(2)),
             [torch.tensor(5.0) for _ in waits]]
    options = {"left": left, "gap": 7, "first_gaps": [3] * count, "seeds": list(range(count)), "moments": "rotate"}
    return (*lists, torch.tensor(0.1)), options | changes


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_refresh_from_sketch(left):
    arguments, options = arguments_of_refresh(left)
    before = [b.clone() for b in arguments[0]]
    ops.refresh_from_sketch_(*arguments, **options)
    assert [c.item() for c in arguments[2]] == [6, 2, -2, 1]  # gap, first gap, one nearer, one nearer
    assert [torch.equal(b, a) for b, a in zip(before, arguments[0])] == [False, False, True, True]
    arguments, options = arguments_of_refresh(left, waits=(0,))
    torch.library.opcheck(ops.refresh_from_sketch_.default, arguments, options)


@pytest.mark.parametrize("changes, message", [
    ({"gap": 0}, "gap must be at least 1, got 0"),
    ({"seeds": [1]}, "seeds must have 4 tensors like bases, got 1"),
    ({"moments": "drop"}, "moments must be one of keep, reset, rotate, got 'drop'"),
    ({}, r"sketch must have shape \(12, l\) with l >= rank = 4 for left=True, got \(12, 3\)"),
])
def test_refresh_from_sketch_refuses(changes, message):
    arguments, options = arguments_of_refresh(True)
    arguments[1][1] = arguments[1][1][:, :3].contiguous()
    before = [b.clone() for b in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        ops.refresh_from_sketch_(*arguments, **options | changes)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sketch_finds_the_subspace(left, dtype):
    """Exact for a gradient of rank r; with a warm start within 1% of the best energy where singular values decay."""
    torch.manual_seed(0)
    m, n, r = 60, 90, 8
    basis = torch.linalg.qr(torch.randn(m if left else n, r))[0].contiguous().to(dtype)
    other = n if left else m

    def refreshed(grad, exp_avg):
        omega = ops.sketch_directions(basis, exp_avg, other=other, left=left, seed=3)
        assert omega.dtype == dtype and omega.shape == (other, 16)
        gram = omega.float().T @ omega.float()
        torch.testing.assert_close(gram, torch.eye(16), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0)
        parts = [ops.project(g, omega, left=not left) for g in (0.3 * grad, 0.7 * grad)]
        new = basis.clone()
        ops.refresh_from_sketch_([new], [parts[0] + parts[1]], [torch.tensor(0)], [], [], [], torch.tensor(0.1), left=left,
                                 gap=5, first_gaps=[1], seeds=[3], moments="keep")
        r_ = ops.project(grad.contiguous(), new.float(), left=left)
        return (r_.norm() ** 2 / torch.linalg.svdvals(grad)[:r].square().sum()).item()

    u, _, vh = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    exact = (u[:, :r] * torch.linspace(2, 1, r)) @ vh[:r]
    assert refreshed(exact, None) > (1 - 1e-3 if dtype == torch.bfloat16 else 1 - 1e-5)
    decaying = (u * 0.9 ** torch.arange(60)) @ vh
    exp_avg = (u[:, :r].T @ decaying if left else decaying @ vh[:r].T).contiguous()
    cold = refreshed(decaying, None)
    assert refreshed(decaying, exp_avg) > 0.99 and refreshed(decaying, exp_avg) > cold
    assert refreshed(decaying, torch.zeros_like(exp_avg)) == pytest.approx(cold, abs=1e-2)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_sketch_directions_opcheck_and_errors(left):
    basis = torch.linalg.qr(torch.randn(12, 4))[0].contiguous()
    exp_avg = torch.randn((4, 20) if left else (20, 4))
    torch.library.opcheck(ops.sketch_directions.default, (basis, exp_avg), {"other": 20, "left": left, "seed": 1})
    with pytest.raises(RuntimeError, match="other must be at least rank = 4, got 3"):
        ops.sketch_directions(basis, None, other=3, left=left)
    with pytest.raises(RuntimeError, match="exp_avg must have shape"):
        ops.sketch_directions(basis, exp_avg.T.contiguous(), other=20, left=left)


# lowrank train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for module in (argparse, copy, shutil, json):
        (folder / f"{module.__name__}.py").write_bytes(Path(module.__file__).read_bytes())
    return folder


def command(text, out, *more):
    return cli.main([
        "train", "--model", "llama-1m", "--rank", "8", "--steps", "4", "--batch-size", "2", "--seq-len", "32",
        "--update-proj-gap", "2", "--eval-steps", "4", "--save-steps", "2", "--eval-tokens", "128", "--device", "cpu",
        "--warmup-steps", "1", "--data", str(text), "--out", str(out), *more])


@pytest.mark.parametrize("flags", [["accumulate", "--gradient-accumulation-steps", "2"], ["in_backward"]], ids=lambda f: f[0])
def test_lowrank_train(text, tmp_path, flags):
    flags = ["--per-layer", *flags]
    assert command(text, tmp_path / "run", *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert b"low_rank_gradients" not in weights

    # stopped after step 2, in the middle of a gap, and gone on with
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("final", "step-00000004"):
        shutil.rmtree(tmp_path / "again" / name)
    assert command(text, tmp_path / "again", "--resume", *flags) == 0
    assert (tmp_path / "again" / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("flags, message", [
    (["--per-layer", "twice"], "--per-layer: unknown 'twice'; valid: accumulate, in_backward"),
    (["--per-layer", "in_backward", "--gradient-accumulation-steps", "2"], "use --per-layer accumulate"),
    (["--per-layer", "accumulate", "--method", "adamw"], "--per-layer needs a method with low-rank gradients"),
    (["--per-layer", "accumulate", "--method", "galore-adafactor"], "needs a rule that can start from R"),
])
def test_bad_flags(text, tmp_path, capsys, flags, message):
    assert command(text, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
