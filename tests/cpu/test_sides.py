"""What 'auto' compares, by hand, and where it is said."""

import logging

import pytest
import torch
from torch import nn

from lowrank_sys.nn import ProjectedLinear, compare_sides, project_model
from lowrank_sys.nn.sides import Cost


class Mlp(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(32, 86, dtype=dtype), nn.Linear(86, 32, dtype=dtype)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_by_hand(dtype, size):
    """The moments of gate are 86 / 32 = 2.7 times as long on the right."""
    gate, down = compare_sides(Mlp(dtype), rank=8, tokens=10)
    assert (gate.name, gate.shape, down.name, down.shape) == ("gate_proj", (86, 32), "down_proj", (32, 86))
    assert gate.left == Cost(12 * 8 * 32, size * 8 * 86, size * 10 * 32)
    assert gate.right == Cost(12 * 8 * 86, size * 8 * 32, size * 10 * 8)
    assert down.left == Cost(12 * 8 * 86, size * 8 * 32, size * 10 * 86)
    assert down.right == Cost(12 * 8 * 32, size * 8 * 86, size * 10 * 8)
    assert (gate.cheaper, down.cheaper) == ("left", "right")


def test_a_transposed_weight_keeps_x_b_on_the_left():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(86, 32))  # (in, out)
    (one,) = compare_sides(model, rank=8, tokens=10)
    assert one.shape == (32, 86) and (one.left.kept, one.right.kept) == (4 * 10 * 8, 4 * 10 * 32)


def test_auto_takes_what_is_cheaper_and_says_so(caplog):
    model = Mlp()
    compared = {one.name: one for one in compare_sides(model, rank=8, tokens=10)}
    with caplog.at_level(logging.INFO, "lowrank_sys.nn"):
        project_model(model, 8, "left")
    assert not caplog.records
    model = Mlp()
    with caplog.at_level(logging.INFO, "lowrank_sys.nn"):
        project_model(model, 8, "auto", tokens=10)
    for name, layer in model.named_children():
        assert isinstance(layer, ProjectedLinear) and ("left" if layer.projection.left else "right") == compared[name].cheaper
    totals = [sum(getattr(one, side).total for one in compared.values()) / 2**20 for side in ("left", "right")]
    (record,) = caplog.records
    assert "2 layers: all left {:.1f} MiB, all right {:.1f} MiB, 1 left and 1 right".format(*totals) in record.getMessage()


def test_bad_input():
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1, got 0"):
        compare_sides(Mlp(), 8, tokens=0)
    with pytest.raises(ValueError, match="no trainable linear layer to project at rank 64"):
        compare_sides(Mlp(), 64)
