"""The examples of the README and of docs/optimizers.md run as they stand."""

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    """Answers as a transformers model does: an output with a loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x, y):
        loss = nn.functional.mse_loss(self.linear(x), y)
        return type("Output", (), {"loss": loss})


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_op_in_a_loop():
    loop = {}
    exec(blocks("docs/optimizers.md")[0], loop)
    assert (loop["W"] - loop["target"]).norm() < 0.99 * loop["target"].norm() * 2**0.5  # closer than where it began


def test_optimizers():
    pages = [blocks("README.md"), blocks("docs/optimizers.md")[1:]]
    assert [len(page) for page in pages] == [1, 4]
    torch.manual_seed(0)
    model = Model()
    batch = {"x": torch.randn(32, 256), "y": torch.randn(32, 256)}
    for block in [*pages[0], *pages[1]]:
        before = model(**batch).loss.item()
        exec(block, {"model": model, "loader": [batch] * 20})
        assert model(**batch).loss.item() < before
