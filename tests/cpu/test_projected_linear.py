"""ProjectedLinear in training: backward gives R and no G, and the loss is that of GaLore in the optimizer."""

import copy
import io
import math

import pytest
import torch
from lanes import usual
from projected_model import BOTH, CLOSE, RANK, VOCAB, backward, batch, galore, kept_bytes, layers, llama, projected, train
from small_model import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_sys.nn import project_model, quantize_model
from lowrank_sys.optim import GaLoreAdamW, GaLoreAdamW8bit


def clip_by_torch(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def clip_by_optimizer(model, optimizer):
    optimizer.clip_grad_norm_(0.3)


@pytest.mark.parametrize("clipped", usual([False], True), ids=["", "clipped"])
@pytest.mark.parametrize("keys", usual([{}], {"moments": "rotate"}), ids=str)
@BOTH
def test_the_loss_curve_of_optimizer_side_galore(side, keys, clipped):
    """Over 36 steps and nine refreshes a matrix, on whole gradients and on accumulated ones, with the same bases."""
    model, optimizer = projected(side, **keys)
    losses = train(model, optimizer, range(36), clip=clip_by_torch if clipped else None)
    assert optimizer.refreshes().keys() == {f"{name}.weight" for name in layers(model)}
    for per_layer in (None, "accumulate"):
        other = llama()
        theirs = galore(other, per_layer, proj_type=side, refresh="next", **keys)
        torch.testing.assert_close(losses, train(other, theirs, range(36), clip=clip_by_optimizer if clipped else None), **CLOSE)
        for (name, layer), p in zip(layers(model).items(), theirs.param_groups[1]["params"]):
            ours, basis = (o.state[w]["basis"] for o, w in ((optimizer, layer.weight), (theirs, p)))
            assert (ours.T @ basis).square().sum() > RANK - 1e-3, name  # one subspace: random ones share 2 of 8
            moved = (p - llama().get_parameter(f"{name}.weight")).abs().max()
            assert (p - layer.weight).abs().max() < 1e-5 < 1e-3 < moved, name


def test_it_learns():
    model, optimizer = projected("auto")
    same = [0] * 30
    losses = train(model, optimizer, same)
    assert losses[-1] < 0.5 * losses[0] and abs(losses[0] - math.log(VOCAB)) < 0.1


class Made(TorchDispatchMode):
    """Shapes of all that is allocated, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = {id(a.untyped_storage()._cdata) and a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in taken:
                self.shapes.append(tuple(sorted(tensor.shape)))
        return made


def made_in_backward(model, step):
    loss = model(input_ids=batch(step), labels=batch(step)).loss
    with Made() as made:
        loss.backward()
    return made.shapes


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@BOTH
def test_no_gradient_of_a_weight_is_made(side, int8):
    """Not in a refresh either, which has but a sketch."""
    # sizes of weights that no activation has
    sizes = {tuple(sorted(layer.weight.shape)) for layer in layers(project_model(llama(), RANK)).values()}
    assert sizes <= set(made_in_backward(llama(), 0))  # as it would be seen
    model = llama()
    if int8:
        quantize_model(model, group_size=32)
    model, optimizer = projected(side, model)
    due = 0
    for step in range(8):
        due += len(optimizer.gradients.announced())
        assert not sizes & set(made_in_backward(model, step))
        assert all(layer.weight.grad is None for layer in layers(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert due >= 2 * len(layers(model))  # every matrix was refreshed twice


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@BOTH
def test_what_a_layer_keeps_for_backward(side, int8):
    """On the right r / in of its input, and the input too where a basis is due; on the left the input."""
    model, rows = llama(), 20
    if int8:
        quantize_model(model, group_size=32)
    model, optimizer = projected(side, model)
    seen = set()
    for step in range(4):
        for layer in layers(model).values():
            whole, narrow, due = 4 * rows * layer.in_features, 4 * rows * RANK, layer.projection.omega is not None
            assert kept_bytes(layer, rows) == (whole if side == "left" else narrow + whole * due)
            seen.add(due)
        train(model, optimizer, [step])
    assert seen == {True, False}


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit], ids=["galore", "galore8bit"])
@BOTH
def test_resume_is_exact_to_the_bit(side, cls):
    """From any step of a refresh gap, and from the checkpoint of a model that is not projected."""
    whole, optimizer = projected(side, cls=cls)
    for step in range(9):
        train(whole, optimizer, [step])
        if step not in (0, 4, 6):
            continue
        file = io.BytesIO()
        torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, other = projected(side, model=llama(seed=1), cls=cls)
        train(model, other, [99])
        model.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        again = copy.deepcopy(saved)  # what goes on must not have changed it
        straight, theirs = copy.deepcopy((whole, optimizer))
        assert torch.equal(train(model, other, range(step + 1, 12)), train(straight, theirs, range(step + 1, 12)))
        assert_same(model, straight)
        assert all(torch.equal(v, saved["model"][k]) for k, v in again["model"].items())
        plain = llama(seed=1)
        plain.load_state_dict(saved["model"])
        galore(plain, "accumulate", cls, proj_type=side).load_state_dict(saved["optimizer"])


def test_a_checkpoint_has_neither_basis_nor_coefficient(tmp_path):
    from transformers import LlamaForCausalLM

    model, optimizer = projected("auto")
    train(model, optimizer, range(3))
    assert list(model.state_dict()) == list(llama().state_dict())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    model.load_state_dict(loaded.state_dict(), strict=True)
    count = sum(1 for group in optimizer.param_groups for _ in group["params"]) - len(layers(model))
    assert sum(len(group["params"]) for group in optimizer.state_dict()["param_groups"]) == count
    assert [n for n, _ in model.named_parameters()][: len(list(llama().parameters()))] == [n for n, _ in llama().named_parameters()]


@BOTH
def test_four_micro_batches_are_one_batch(side):
    (one, first), (four, second) = projected(side), projected(side)
    losses = [train(one, first, range(12), 1, clip_by_torch), train(four, second, range(12), 4, clip_by_torch)]
    torch.testing.assert_close(*losses, **CLOSE)
    assert_same(one, four, atol=1e-4, rtol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["model", "optimizer"])
@BOTH
def test_zero_grad(side, of, set_to_none):
    """Between the steps, and to throw a micro-batch away: the sketch goes with the gradient."""
    (clean, first), (model, second) = projected(side, update_proj_gap=2), projected(side, update_proj_gap=2)
    for step in range(6):
        backward(clean, step)
        backward(model, 100 + step)
        zero = {"model": model, "optimizer": second}[of].zero_grad
        zero(set_to_none=set_to_none)
        backward(model, step)
        first.step()
        second.step()
        first.zero_grad()
        zero(set_to_none=set_to_none)
    assert_same(clean, model)


def test_a_forgotten_zero_grad_is_an_error():
    model, optimizer = projected()
    backward(model, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after step\(\)"):
        backward(model, 1)
    optimizer.zero_grad()
    train(model, optimizer, [1])


def test_grad_scaler():
    losses = []
    for scaled in (False, True):
        model, optimizer = projected()
        scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled), []
        for step in range(10):
            scaler.scale(model(input_ids=batch(step), labels=batch(step)).loss).backward()
            scaler.unscale_(optimizer)
            found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses.append(torch.tensor(found))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def test_transformers_trainer(tmp_path):
    """Unchanged, with micro-batches and clipping."""
    from transformers import Trainer, TrainingArguments

    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        model, optimizer = projected("auto")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            use_cpu=True, max_grad_norm=0.3, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for step in range(6) for row in batch(step)]
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train()
        found.append((model, [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4) and max(found[0][1]) > 0.3
    assert_same(found[0][0], found[1][0], atol=1e-4, rtol=0)
