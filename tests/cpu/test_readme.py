"""The README's examples run as they stand."""

import re
from pathlib import Path

import torch
from torch import nn

README = Path(__file__).parents[2] / "README.md"


class Model(nn.Module):
    """Answers as a transformers model does: an output with a loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x, y):
        loss = nn.functional.mse_loss(self.linear(x), y)
        return type("Output", (), {"loss": loss})


def test_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    loop = {}
    exec(blocks[0], loop)
    assert (loop["W"] - loop["target"]).norm() < 0.99 * loop["target"].norm() * 2**0.5  # closer than where it began

    torch.manual_seed(0)
    model = Model()
    batch = {"x": torch.randn(32, 256), "y": torch.randn(32, 256)}
    for block in blocks[1:]:
        before = model(**batch).loss.item()
        exec(block, {"model": model, "loader": [batch] * 20})
        assert model(**batch).loss.item() < before
