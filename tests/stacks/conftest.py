"""What the tests of the stacks share: no peer is here, a small model and chats on the disk, and a count of what trained."""

import collections
import contextlib
import importlib.util
import json
from typing import NamedTuple

import pytest
import torch
from test_chats import CHATML, tokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

PEERS = ("galore_torch", "apollo_torch", "q_galore_torch")


@pytest.fixture(autouse=True, scope="session")
def no_peer():
    there = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    assert not there, f"{', '.join(there)} must not be installed where a stack is tested"


class Seen(NamedTuple):
    """optimizers: {class: steps}. ops: {name of an op of ours: calls}."""

    optimizers: collections.Counter
    ops: collections.Counter


class _Ops(TorchDispatchMode):
    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lowrank":
            self.ops[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted():
    """A context whose value is what was Seen inside it."""

    @contextlib.contextmanager
    def count():
        seen = Seen(collections.Counter(), collections.Counter())

        def after(optimizer, args, kwargs):
            seen.optimizers[type(optimizer)] += 1

        handle = register_optimizer_step_post_hook(after)
        try:
            with _Ops(seen.ops):
                yield seen
        finally:
            handle.remove()

    return count


@pytest.fixture
def trained_by(counted):
    """A context in which training must go by steps of this class, all of them, and by ops of ours."""

    @contextlib.contextmanager
    def by(cls, steps):
        with counted() as seen:
            yield seen
        assert sum(seen.optimizers.values()) == steps and all(issubclass(found, cls) for found in seen.optimizers), seen
        assert sum(seen.ops.values()) >= steps, seen

    return by


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of a small LLaMA with its tokenizer."""
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = tokenizer(CHATML)
    tokens.pad_token = tokens.eos_token
    tokens.save_pretrained(made)
    config = LlamaConfig(**sizes, vocab_size=128, max_position_embeddings=256, bos_token_id=None, eos_token_id=tokens.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of conversations with `messages`."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [[{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(16)]
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return file
