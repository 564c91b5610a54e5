"""What goes over all of a model's parameters, averages above all, beside per_layer's coefficients."""

import copy
import io

import pytest
import torch
from small_model import backward, build, clip_by_torch, coefficients, galore, loss_of, tokens, train
from torch import nn
from torch.optim.swa_utils import AveragedModel


def lerp(shadow, model):
    """An average by hand, over a list that pairs by position."""
    with torch.no_grad():
        for average, p in zip(shadow, model.parameters()):
            average.lerp_(p, 0.5)


def averaged(model):
    return AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


def listed(model):
    return [p.detach().clone() for p in model.parameters()]


class Foreach:
    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update_parameters(self, model):
        mine = list(self.module.parameters())
        with torch.no_grad():
            torch._foreach_mul_(mine, 0.5)
            torch._foreach_add_(mine, list(model.parameters())[: len(mine)], alpha=0.5)


class ByHand:
    def __init__(self, model):
        self.module, self.shadow = copy.deepcopy(model), listed(model)

    def update_parameters(self, model):
        lerp(self.shadow, model)
        with torch.no_grad():
            for p, average in zip(self.module.parameters(), self.shadow):
                p.data.copy_(average)


# What the average is after the first value and others.
EMA = (lambda values: values[1], lambda old, new, count: 0.5 * old + 0.5 * new)
FROM_THE_START = (lambda values: 0.5 * values[0] + 0.5 * values[1], EMA[1])
MEAN = (lambda values: values[1], lambda old, new, count: old + (new - old) / count)
KINDS = {
    "ema": (averaged, EMA),
    "swa": (AveragedModel, MEAN),
    "avg_fn": (lambda model: AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new), EMA),
    "buffers": (lambda model: AveragedModel(model, use_buffers=True), MEAN),
    "foreach": (Foreach, FROM_THE_START),
    "by hand": (ByHand, FROM_THE_START),
}


class Nested(nn.Module):
    """Matrices in the middle, in containers that iterate over their children."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = build()[:5]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48, bias=False), nn.LayerNorm(48)) for _ in range(2))
        self.head = nn.Linear(48, 50)

    def forward(self, ids):
        x = self.body(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("make", [build, Nested])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_that_of_the_weights(kind, when, make):
    made, (first, then) = KINDS[kind]
    model = make()
    average = made(model) if when == "before" else None
    optimizer = galore(model)
    average = average or made(model)
    values = [copy.deepcopy(model.state_dict())]
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        values.append(copy.deepcopy(model.state_dict()))
    for name, found in average.module.state_dict().items():
        wanted = first([value[name] for value in values])
        for count, value in enumerate(values[2:], start=2):
            wanted = then(wanted, value[name], count)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0, msg=lambda m: f"{name}: {m}")
    assert not torch.equal(average.module.state_dict()[name], values[-1][name])


@pytest.mark.parametrize("part", ["body", "blocks"])
def test_an_average_of_a_part(part):
    model = Nested()
    average = AveragedModel(getattr(model, part))
    optimizer = galore(model)
    train(model, optimizer, [0])
    average.update_parameters(getattr(model, part))
    for (name, p), q in zip(getattr(model, part).state_dict().items(), average.module.state_dict().values()):
        assert torch.equal(p, q), name


def test_the_weights_keep_their_places():
    model, other = Nested(), Nested()
    names = [name for name, _ in model.named_parameters()]
    optimizer = galore(model)
    assert [name for name, _ in model.named_parameters()] == [*names, *coefficients(model)]
    assert len(coefficients(model)) == 4 and len(coefficients(model.blocks)) == 2
    again = copy.deepcopy(model)
    assert [name for name, _ in again.named_parameters()] == [*names, *coefficients(model)]
    assert all(p.untyped_storage().nbytes() == 4 for p in coefficients(again).values())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [name for name, _ in loaded.named_parameters()] == [*names, *coefficients(model)]
    wrapped = nn.Sequential(model)
    assert [name for name, _ in wrapped.named_parameters()] == [f"0.{name}" for name in (*names, *coefficients(model))]
    optimizer.release()
    assert [name for name, _ in model.named_parameters()] == names
    assert [m.__dict__.keys() for m in model.modules()] == [
        m.__dict__.keys() | ({"_ddp_params_and_buffers_to_ignore"} if i == 0 else set()) for i, m in enumerate(other.modules())
    ]


@pytest.mark.parametrize("part", ["whole", "body", "blocks"])
def test_clipping_finds_the_coefficients(part):
    model = Nested()
    optimizer = galore(model)
    backward(model, 0)
    chosen = model if part == "whole" else getattr(model, part)
    assert nn.utils.clip_grad_norm_(chosen.parameters(), 1e-3) > 1e-3
    grads = [p.grad for p in coefficients(chosen).values()]
    assert len(grads) == {"whole": 4, "body": 2, "blocks": 2}[part]
    assert 0 < nn.utils.get_total_norm(grads) <= 1e-3
    optimizer.step()


def fill_slices(p):
    p.data[0] = 1
    p.detach().view(-1)[:3].fill_(1)
    p.T.mul_(2)
    p *= 3


@pytest.mark.parametrize(
    "write",
    [
        nn.init.ones_,
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        nn.init.trunc_normal_,
        nn.init.uniform_,
        fill_slices,
        lambda p: p.requires_grad_(True),
        lambda p: p.data.copy_(torch.ones_like(p)),
        lambda p: torch._foreach_add_([p, torch.zeros(2)], 1),
        lambda p: torch._foreach_copy_([p], [torch.ones(p.shape)]),
    ],
)
def test_a_coefficient_stays_zero(write):
    model, other = build(), build()
    optimizers = [galore(model), galore(other)]
    with torch.no_grad():
        for p in coefficients(model).values():
            write(p)
    for p in coefficients(model).values():
        assert (p == 0).all() and p.untyped_storage().nbytes() == 4 and not p.requires_grad
        assert torch.ones_like(p).add_(p).eq(1).all()
    for m, o in zip((model, other), optimizers):
        train(m, o, range(3), clip=clip_by_torch)
    assert torch.equal(model[1].weight, other[1].weight)


def test_a_list_of_writes_leaves_out_coefficients_alone():
    p, plain = next(iter(coefficients(_accumulating()).values())), torch.zeros(3)
    torch._foreach_addcdiv_([p, plain], [torch.ones(p.shape), torch.ones(3)], [torch.ones(p.shape), torch.full((3,), 2.0)])
    assert plain.tolist() == [0.5] * 3
    torch._foreach_add_([plain, p], [1.0, 2.0])
    assert plain.tolist() == [1.5] * 3 and (p == 0).all()


def _accumulating():
    model = build()
    model.optimizer_of_it = [galore(model)]  # kept alive
    return model


def test_a_vector_of_all_parameters():
    model = build()
    optimizer = galore(model)
    train(model, optimizer, range(2))
    vector = nn.utils.parameters_to_vector(model.parameters())
    loss = loss_of(model, tokens(7))
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())
    assert loss_of(model, tokens(7)) != loss
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert loss_of(model, tokens(7)) == loss
    train(model, optimizer, range(2, 4))
    assert all(p.untyped_storage().nbytes() == 4 for p in coefficients(model).values())


OPTIONS = {
    "default": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "on the CPU": {"cpu_offload": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.mark.parametrize("target", ["accumulate", None, "in_backward"])
@pytest.mark.parametrize("options", OPTIONS)
def test_distributed_checkpoints(options, target):
    """Saved while accumulating, taken up in every mode."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    model, resumed = build(), build()
    optimizer = galore(model)
    train(model, optimizer, range(5))
    chosen = StateDictOptions(**OPTIONS[options])
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=chosen))
    assert "low_rank_gradients" not in repr(saved)
    resumed.load_state_dict(model.state_dict())
    fresh = galore(resumed, target, **({} if target == "accumulate" else {"refresh": "next"}))
    set_optimizer_state_dict(resumed, fresh, saved, options=chosen)
    for p, q in zip(model.state_dict(keep_vars=True).values(), resumed.state_dict(keep_vars=True).values()):
        assert all(torch.equal(fresh.state[q][key], optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    if target == "accumulate":
        for m, o in ((model, optimizer), (resumed, fresh)):
            train(m, o, range(5, 12))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))
