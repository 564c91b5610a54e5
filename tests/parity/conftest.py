"""A small LLaMA on byte data, and the gradients of its training steps."""

import glob
import os

import pytest
import torch


@pytest.fixture(scope="session")
def tokens():
    """The first bytes of the Python library's own sources, as tokens."""
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))
    data = b"".join(open(f, "rb").read() for f in files[:40])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


@pytest.fixture
def llama():
    """llama-1m with a fixed initialisation; call it for as many equal copies as needed."""
    from lowrank_sys.train import models

    def build():
        torch.manual_seed(0)
        return models.build(models.config("llama-1m"), dtype=torch.float32, device=torch.device("cpu"))

    return build


@pytest.fixture
def backward(tokens):
    """backward(model, step): gradients of the next-token loss on batch `step` of 4 x 64 tokens."""

    def run(model, step):
        batch = tokens[step * 256 : (step + 1) * 256].view(4, 64)
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        return loss.item()

    return run
