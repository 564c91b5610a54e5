"""A small model under any method."""

import copy

import torch
from methods.inputs import GAP
from small_model import backward, build, loss_of, tokens

from lowrank_sys.nn import quantize_model
from lowrank_sys.optim.preset import METHODS


def made(name, dtype=torch.float32, int8=False, per_layer=None, bits=None, **keys):
    """(a small model, its optimizer)."""
    method, model = METHODS[name], build(dtype)
    if int8:
        model = quantize_model(model, group_size=32)
    low = {"rank": None} if method.rank is None else {"rank": min(method.rank, 8), "update_proj_gap": GAP}
    plain = {"lr": 1e-2} if bits is None else {"lr": 1e-2, "min_8bit_size": 0}
    groups = method.groups(model, plain=plain, **{**low, **method.keys, **keys})
    options = {**method.options, **(method.int8_options if int8 else {}), **({} if bits is None else {"bits": bits})}
    return model, method.optimizer(groups, lr=1e-2, per_layer=per_layer, **options)


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def bytes_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "low_rank_gradients" not in name}


def assert_alike(a, b):
    a, b = bytes_of(a), bytes_of(b)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def mean_loss(model):
    with torch.no_grad():
        return sum(loss_of(model, tokens(step)).item() for step in range(4)) / 4


def assert_resumed(model, optimizer, again, steps, loss):
    """A run that goes on from the state of another, `again` = (model, optimizer), is the same to the bit, and has learned."""
    again[0].load_state_dict(model.state_dict())
    again[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), again):
        run(m, o, steps)
    assert_alike(model, again[0])
    assert mean_loss(model) < loss - 0.05
