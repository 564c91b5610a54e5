"""What goes wrong on one rank, or is there on one rank alone, has one outcome on all."""

import copy
import pickle

import pytest
import torch
import world
from projected_model import VOCAB, galore, llama, projected
from small import CLOSE, assert_same, bases, ids_of, train, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.nn import project_model, quantize_model
from lowrank_sys.optim import Accumulate
from lowrank_sys.subspace import iteration

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SIZE = 6, 2


def accumulating(model=None, per_layer="accumulate", **keys):
    model = llama() if model is None else model
    return model, galore(model, per_layer, **keys)


BOTH = {"accumulate": accumulating, "projected": projected}


class Chosen(nn.Module):
    """Two experts, of which a batch uses the one that its first token names; with the third layer used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 24), nn.Linear(24, VOCAB)
        self.experts, self.twice = nn.ModuleList(nn.Linear(24, 24) for _ in range(2)), nn.Linear(24, 24)

    def forward(self, input_ids, labels, expert=0):
        x = self.twice(self.twice(self.embed(input_ids)).relu())
        y = self.head(self.experts[expert](x).relu())
        return nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten())


def overflow(rank, size, make):
    """A GradScaler whose gradients overflow on rank 1, in step 2."""
    model, optimizer = make()
    ddp, scaler, found = DistributedDataParallel(model), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(STEPS):
        ids = ids_of(step).chunk(size)[rank]
        loss = scaler.scale(ddp(input_ids=ids, labels=ids).loss)
        (loss * (torch.inf if (step, rank) == (2, 1) else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(scaler.get_scale())
    return found, weights(model), bases(optimizer)


def not_a_number(rank, size, make):
    """In one element of a gradient on rank 1, in step 2: each channel that it reaches is left out on both."""
    model, optimizer = make()
    ddp, layer = DistributedDataParallel(model), model.model.layers[0].mlp.up_proj
    for step in range(STEPS):
        loss = ddp(input_ids=ids_of(step).chunk(size)[rank], labels=ids_of(step).chunk(size)[rank]).loss
        if (step, rank) == (2, 1):
            leaf = layer.low_rank_gradients.weight if hasattr(layer, "projection") else layer.weight
            handle = leaf.register_hook(lambda g: torch.where(torch.arange(g.numel()).view_as(g) == 5, torch.nan, g))
        loss.backward()
        if (step, rank) == (2, 1):
            handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.skipped(), weights(model), bases(optimizer)


def experts(rank, size, make):
    """Each rank uses an expert of its own, and from step 4 on none uses the second."""
    model, optimizer = make(model=Chosen())
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(8):
        ids = ids_of(step).chunk(size)[rank]
        ddp(ids, ids, expert=rank if step < 4 else 0).backward()
        assert (model.experts[1].weight.grad is None) and model.twice.weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    return [], weights(model), bases(optimizer)


def quantized(rank, size, make):
    """INT8 weights that ranks begin with a different seed; the step that rounds is the same."""
    model, optimizer = make(model=quantize_model(llama(seed=rank), group_size=32))
    losses = train(DistributedDataParallel(model), optimizer, STEPS, rank=rank, size=size, micro=2)
    return losses, weights(model), bases(optimizer)


def wrapped_before(rank, size, make):
    """The optimizer is built for the model inside of a wrapper that is there already."""
    model = llama()
    if make is projected:
        project_model(model, 8, "right")
    ddp = DistributedDataParallel(model)
    optimizer = galore(ddp.module, "accumulate")
    return train(ddp, optimizer, STEPS, rank=rank, size=size), weights(model), bases(optimizer)


def replaced(rank, size, make):
    """A hook of the user's puts another gradient in the place of each."""
    model, optimizer = with_replacing_hooks(make)
    return train(DistributedDataParallel(model), optimizer, STEPS, rank=rank, size=size), weights(model), bases(optimizer)


def with_replacing_hooks(make):
    model = llama()
    if make is projected:
        project_model(model, 8, "right")
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 0.5 * p.grad))
    return model, galore(model, "accumulate")


def copied(rank, size, make):
    """A model and its optimizer that are copied in the middle of a run go on as they would have; a file of the model is one."""
    model, optimizer = make()
    train(DistributedDataParallel(model), optimizer, 2, rank=rank, size=size)
    model, optimizer = copy.deepcopy((model, optimizer))
    losses = train(DistributedDataParallel(model), optimizer, range(2, STEPS), rank=rank, size=size, clip=0.3)
    assert_same(weights(pickle.loads(pickle.dumps(model))), weights(model))
    return losses, weights(model), bases(optimizer)


def another_library(rank, size, make):
    """On rank 1 the vectors of every new basis come out flipped, and moments are carried over."""
    model, optimizer = make(moments="rotate")
    signs = iteration.canonical_signs
    try:
        if rank == 1:
            iteration.canonical_signs = lambda basis, old=None: -signs(basis, old)
        losses = train(DistributedDataParallel(model), optimizer, STEPS, rank=rank, size=size)
    finally:
        iteration.canonical_signs = signs
    return losses, weights(model), bases(optimizer)


def not_wrapped(rank, size, make):
    """Nobody averages: of the matrices that accumulate, which alone train here, step() does."""
    model, optimizer = only_matrices(make)
    return train(model, optimizer, STEPS, rank=rank, size=size), weights(model), bases(optimizer)


def only_matrices(make):
    model, optimizer = make()
    for name, p in model.named_parameters():
        p.requires_grad_("proj" in name and "low_rank" not in name)
    return model, optimizer


def bf16(rank, size, make):
    model, optimizer = make(per_layer=Accumulate(torch.bfloat16))
    return train(DistributedDataParallel(model), optimizer, STEPS, rank=rank, size=size, micro=2), weights(model), bases(optimizer)


EACH = (overflow, not_a_number, experts, quantized, wrapped_before, replaced, copied, another_library, bf16)
CASES = [*((case, name) for case in EACH for name in BOTH), (not_wrapped, "accumulate")]


def all_cases(rank, size):
    return {(case.__name__, name): case(rank, size, BOTH[name]) for case, name in CASES}


def test_one_outcome_on_all_ranks():
    ranks = world.run(SIZE, all_cases, SIZE)
    for key, (_, state, basis) in ranks[0].items():
        for other in ranks[1:]:
            assert_same(other[key][1], state)
            assert all(map(torch.equal, other[key][2], basis)), key

    def assert_as_alone(case, name, model, optimizer, micro=1, close=CLOSE, steps=STEPS, clip=None):
        alone = torch.tensor(train(model, optimizer, steps, micro=micro, clip=clip))
        mean = torch.tensor([one[case, name][0] for one in ranks]).mean(0)
        torch.testing.assert_close(mean, alone, **close, msg=lambda m: f"{case} {name}: {m}")

    for name, make in BOTH.items():
        assert [one["overflow", name][0] for one in ranks] == [[2.0**10] * 2 + [2.0**9] * 4] * SIZE
        skipped = {one["not_a_number", name][0] for one in ranks}
        assert len(skipped) == 1 and skipped.pop() in (32, 48)  # one channel
        used = ranks[0]["experts", name][1]
        assert not any(torch.equal(e.weight, used[f"experts.{i}.weight"]) for i, e in enumerate(Chosen().experts))
        # codes that are rounded the other way part the runs
        assert_as_alone("quantized", name, *make(model=quantize_model(llama(), group_size=32)), 2, {"atol": 5e-3, "rtol": 0})
        assert_as_alone("wrapped_before", name, *make())
        assert_as_alone("replaced", name, *with_replacing_hooks(make))
        assert_as_alone("another_library", name, *make(moments="rotate"))
        model, optimizer = make()
        train(model, optimizer, 2)
        assert_as_alone("copied", name, model, optimizer, steps=range(2, STEPS), clip=0.3)
    assert_as_alone("not_wrapped", "accumulate", *only_matrices(accumulating))
