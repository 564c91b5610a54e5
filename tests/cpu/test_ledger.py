"""The ledger against real allocations."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.optim import GaLoreAdamW, ledger

sys.path.insert(0, str(Path(__file__).parent))
from test_optim import OPTIMIZERS, adamw, backward, build

EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def nbytes(tensors):
    """Bytes of distinct storages, by their addresses."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_in(optimizer, *keys):
    values = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    return [v for k, v in values if isinstance(v, torch.Tensor) and (not keys or k in keys)]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_categories_are_the_storages(name, dtype):
    model = build(dtype)
    optimizer = OPTIMIZERS[name](model)
    before = optimizer.memory()
    assert before["weights"] == before["total"] == nbytes(model.parameters())
    backward(model, 0)
    optimizer.step()
    sums = optimizer.memory()
    assert set(ledger.CATEGORIES) <= sums.keys()
    assert sums["weights"] == sums["gradients"] == nbytes(model.parameters())
    assert sums["basis"] == nbytes(tensors_in(optimizer, "basis", "key", "indices", "row_scale")) > 0
    assert sums["moments"] == nbytes(tensors_in(optimizer, "exp_avg", "exp_avg_sq", "row", "col")) > 0
    counters = [*tensors_in(optimizer, "step", "countdown", "refreshes", "limiter"), *optimizer.counters.values()]
    assert sums["counters"] == nbytes(counters) > 0
    assert sums["other"] == 0  # every key is declared
    assert sums.pop("total") == sum(sums.values())
    assert optimizer.state_bytes() == nbytes(tensors_in(optimizer))
    optimizer.zero_grad()
    assert optimizer.memory()["gradients"] == 0


@EACH
def test_what_operators_allocated_is_what_the_ledger_says(name):
    model = build()
    optimizer = OPTIMIZERS[name](model)
    with LiveStorages() as live:
        backward(model, 0)
        optimizer.step()
        model.zero_grad()
        first = live.bytes
        backward(model, 1)
        optimizer.step()
        model.zero_grad()
        sums = optimizer.memory()
        assert live.bytes == first == sums["total"] - sums["weights"]
        for category, tensor, _ in ledger.entries(optimizer):
            live.track(tensor, category)
        assert {k: v for k, v in live.now().items() if v} == {k: v for k, v in sums.items() if v and k != "total"}


def test_shared_storage_counts_once():
    whole = torch.zeros(64, 32)
    params = [nn.Parameter(part) for part in whole.split(16)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 4}])
    assert optimizer.memory()["weights"] == 4 * 64 * 32


def test_a_part_brings_its_own_categories():
    model = build()
    optimizer = adamw(model)
    backward(model, 0)
    optimizer.step()

    class Quantized(type(optimizer.pipeline.moments)):
        categories = {"exp_avg_scale": "scales", "map": "codebook"}

    class Holding(type(optimizer.gradients)):
        def held(self, optimizer):
            yield "accumulators", torch.zeros(7)

    optimizer.pipeline.moments.__class__, optimizer.gradients.__class__ = Quantized, Holding
    state = optimizer.state[model[1].weight]
    state |= {"exp_avg_scale": torch.zeros(5), "map": torch.zeros(3), "nobody's": torch.zeros(2)}
    before = optimizer.state_bytes() - 4 * 10
    sums = optimizer.memory()
    assert (sums["scales"], sums["codebook"], sums["other"], sums["accumulators"]) == (20, 12, 8, 28)
    assert sums["total"] - sums["weights"] - sums["gradients"] - sums["accumulators"] - 8 == before + 4 * 10  # 8: skipped


def test_accumulators_of_per_layer_updates():
    model = build()
    optimizer = adamw(model, options={"per_layer": "accumulate"})
    backward(model, 0)
    held = optimizer.memory()
    coefficients = optimizer.gradients.coefficients
    assert held["accumulators"] >= sum(4 * c.grad.numel() for c in coefficients.values()) > 0
    assert held["accumulators"] <= sum(optimizer.gradients.memory().values()) + 4 * len(coefficients)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.memory()["accumulators"] == 4 * len(coefficients)  # expanded zeros
