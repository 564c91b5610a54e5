"""Training loops as they are, around layers of low-rank gradients: each as the same loop around optimizer-side GaLore."""

import pytest
import torch
from small_model import CLOSE, LR, assert_same, backward, build, galore, loss_of, tokens
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowrank_sys.nn import ProjectedLinear, project_model

STEPS = 10
BOTH = pytest.mark.parametrize("side", ["left", "right"])


def pair(side):
    """(model of projected layers, its optimizer), (the same model, its optimizer that projects gradients)."""
    model, other = project_model(build(), 16, side), build()
    assert sum(isinstance(module, ProjectedLinear) for module in model) == 2
    return (model, galore(model, per_layer=None)), (other, galore(other, per_layer=None, proj_type=side, refresh="next"))


SCHEDULES = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, cycle_momentum=True),
}


@pytest.mark.parametrize("name", SCHEDULES)
@BOTH
def test_schedulers(side, name):
    """Rates of all groups, and with them beta1, change between steps."""
    (model, first), (other, second) = pair(side)
    rates = []
    for trained, optimizer in ((model, first), (other, second)):
        scheduler = SCHEDULES[name](optimizer)
        for step in range(STEPS):
            backward(trained, step)
            rates.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert rates[:STEPS] == rates[STEPS:] and len({rate for step in rates for rate, _ in step}) > STEPS / 2
    assert_same(model, other, **CLOSE)


@BOTH
def test_a_moving_average_of_the_weights(side):
    averages = []
    for model, optimizer in pair(side):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        with torch.no_grad():
            assert loss_of(average, tokens(0)) != loss_of(model, tokens(0))
        averages.append(average)
    ours, theirs = averages
    assert_same(ours.module, theirs.module, **CLOSE)


@BOTH
def test_accelerate(side):
    """Unchanged: prepare, accumulate, clip_grad_norm_, and a state that is saved and loaded."""
    accelerate = pytest.importorskip("accelerate")
    found = []
    for micro in (1, 4):
        model, optimizer = pair(side)[0]
        scheduler = SCHEDULES["cosine"](optimizer)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro)
        wrapped, stepped, scheduled = accelerator.prepare(model, optimizer, scheduler)
        norms = []
        for step in range(STEPS):
            for part in tokens(step).chunk(micro):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss_of(wrapped, part))
                    if accelerator.sync_gradients:
                        norms.append(accelerator.clip_grad_norm_(wrapped.parameters(), 0.5).item())
                    stepped.step()
                    scheduled.step()
                    stepped.zero_grad()
        found.append((accelerator.unwrap_model(wrapped), torch.tensor(norms)))
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    (one, norms), (four, others) = found
    assert len(norms) == STEPS and (norms > 0.5).any()
    torch.testing.assert_close(norms, others, atol=1e-4, rtol=1e-4)
    assert_same(one, four, **CLOSE)
    plain, optimizer = pair(side)[1]
    scheduler = SCHEDULES["cosine"](optimizer)
    for step in range(STEPS):
        backward(plain, step)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert_same(one, plain, **CLOSE)


@BOTH
def test_a_scaler_that_finds_an_infinity(side):
    """The step is none: weights stay as they are, and the infinity reaches no moment, basis or sketch."""
    models = []
    for model, optimizer in pair(side):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(STEPS):
            bad = step in (0, 5)  # with first bases due, and without
            before = {name: p.clone() for name, p in model.state_dict().items()}
            scaler.scale(loss_of(model, tokens(step)) * (torch.inf if bad else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert bad == all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert scaler.get_scale() == 2.0**8 and len(optimizer.refreshes()) == 2
        assert all(p.isfinite().all() for p in model.parameters())
        models.append(model)
    assert_same(*models, **CLOSE)


@BOTH
def test_a_hook_that_replaces_the_gradient(side):
    """Is as changing it by hand before the step."""
    (model, optimizer), (other, second) = pair(side)[0], pair(side)[0]
    for name, p in model.named_parameters():
        if "low_rank_gradients" in name:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 0.25 * p.grad))
    for step in range(STEPS):
        backward(model, step)
        backward(other, step)
        for name, p in other.named_parameters():
            if "low_rank_gradients" in name:
                p.grad.mul_(0.25)
        optimizer.step()
        second.step()
        optimizer.zero_grad()
        second.zero_grad()
    assert_same(model, other)
