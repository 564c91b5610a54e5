"""per_layer: gradients that are projected, or used up, as soon as they exist, against the optimizer on whole gradients."""

import copy
import gc
import math
import weakref

import pytest
import torch
from small_model import (
    CLOSE,
    EACH,
    LR,
    MODES,
    VOCAB,
    assert_same,
    backward,
    bases,
    build,
    clip_by_torch,
    coefficients,
    galore,
    groups,
    loss_of,
    tokens,
    train,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank_sys.optim import Accumulate, FiraAdamW, GaLoreAdafactor, GaLoreAdamW, InBackward, param_groups


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
    model = nn.Sequential(
        nn.Embedding(VOCAB, 24),
        *(m for _ in range(2) for m in (nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 24, bias=False), nn.Tanh())),
        nn.Linear(24, VOCAB),
    )
    optimizer = GaLoreAdamW(
        param_groups(model, rank=4, target_modules=["1", "3", "5", "7"], update_proj_gap=3), lr=LR, per_layer=per_layer
    )
    matrices = [model[i].weight for i in (1, 3, 5, 7)]
    for step in range(6):
        loss = loss_of(model, tokens(step))
        with DenseTensorsAlive((40, 24), matrices) as tensors:
            loss.backward()
            assert per_layer is None or all(w.grad is None for w in matrices)
            optimizer.step()
        assert tensors.most == most
        optimizer.zero_grad()


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
    for wide in (True, False, False, True):
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
            x = x + (
                torch.tanh(block(x))
                if self.how is None
                else checkpoint(lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=self.how == "reentrant")
            )
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


@pytest.mark.parametrize(
    "per_layer, keys, message",
    [
        ("backward", {}, "per_layer must be None, accumulate, in_backward, an Accumulate or an InBackward, got 'backward'"),
        ("accumulate", {"refresh": "now"}, "refresh must be 'next' with per_layer='accumulate', got 'now'"),
        ("accumulate", {"subspace": "svd"}, "subspace must be randomized, random with refresh='next', got 'svd'"),
        (None, {"refresh": "later"}, "refresh must be one of now, next, got 'later'"),
    ],
)
def test_bad_arguments(per_layer, keys, message):
    with pytest.raises(ValueError, match=message):
        galore(build(), per_layer, **keys)


def test_adafactor_takes_accumulated_gradients():
    """The same steps as from dense ones, with bases from the same sketches."""
    steps = []
    for per_layer in (None, "accumulate"):
        model = build()
        optimizer = GaLoreAdafactor(groups(model, refresh="next"), per_layer=per_layer)
        train(model, optimizer, range(4))
        steps.append(model[1].weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(steps[0], build()[1].weight)


def test_more_bad_arguments():
    model = build()
    with pytest.raises(ValueError, match="got FiraAdamW"):
        FiraAdamW(groups(model), per_layer="accumulate")
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
