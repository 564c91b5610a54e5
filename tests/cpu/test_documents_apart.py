"""Documents of a window do not see each other, in every family; a family that cannot keep them apart is refused."""

import json

import pytest
import torch
from families import FAMILIES, config
from lanes import usual
from test_chats import chat, stream, tokenizer, written

from lowrank_sys import cli
from lowrank_sys.nn.skeleton import auto_class
from lowrank_sys.train import models
from lowrank_sys.train.packing import Packed, mixes

# transformers makes no mask from their positions; and recurrent states run through the whole window.
MIXING = ["falcon_mamba", "gpt_oss", "mpt", "openai-gpt", "qwen2_vl"]
QUICK = ["llama", "gpt_oss"]


def built(family):
    """As the command has it, with attention that is far from even."""
    torch.manual_seed(0)
    made = config(family)
    models.use_cache(made, False)
    model = auto_class(made).from_config(made).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    return model


@pytest.mark.parametrize("family", usual(QUICK, *(family for family in FAMILIES if family not in QUICK)))
def test_a_changed_document_leaves_the_next_one_as_it_was(family):
    model, packed = built(family), Packed(stream([10, 14]), 24, seed=0, length=1)
    (window,), border = packed.windows, packed.border()
    assert len(window) == 2 and border["position_ids"].tolist() == [[10, 11, 12, 13, 0, 1, 2, 3]]
    assert mixes(model, border) == (family in MIXING)

    inputs = {name: values[None] for name, values in packed.window(0).items() if name != "labels"}
    changed = inputs["input_ids"].clone()
    changed[0, :14] += 100
    with torch.no_grad():
        first, other = (model(**{**inputs, "input_ids": ids}).logits[0] for ids in (inputs["input_ids"], changed))
        alone = model(**{name: values[:, 14:] for name, values in inputs.items()}).logits[0]
    assert not torch.equal(first[:14], other[:14])
    if family in MIXING:
        assert (first[14:] - other[14:]).abs().max() > 0.1
        return
    # experts take the tokens of all documents at once: in other groups, the same sums in another order
    assert torch.equal(first[14:], other[14:]) or "num_experts" in FAMILIES[family]
    torch.testing.assert_close(first[14:], other[14:], rtol=0, atol=5e-6)
    torch.testing.assert_close(first[14:], alone, rtol=0, atol=5e-6)


def test_no_border_where_a_window_is_a_document():
    assert Packed(stream([10, 14]), 24, seed=0, length=1, pack=False).border() is None
    assert Packed(stream([10, 14]), 20, seed=0, length=1).border() is None


@pytest.fixture
def words(tmp_path):
    def made(family):
        built(family).save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        data = written(tmp_path / "chat.jsonl", [chat(i) for i in range(9)])
        return ["train", "--from", str(tmp_path / "model"), "--data", data, "--out", str(tmp_path / "run"), "--rank", "4",
                "--seq-len", "48", "--batch-size", "1", "--steps", "1", "--device", "cpu", "--dtype", "fp32"]  # fmt: skip

    return made


def test_who_mixes_them_needs_no_packing(tmp_path, capsys, words):
    asked = words("openai-gpt")
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert said.count("OpenAIGPTLMHeadModel of transformers lets the documents of a window see each other; --no-packing") == 1
    assert cli.main([*asked, "--no-packing"]) == 0


@pytest.mark.parametrize("method", usual(["q-galore"], "galore"))
def test_nothing_is_learned_of_what_the_user_said(tmp_path, monkeypatch, words, method):
    """What the head reads has a gradient where it predicts an answer's token, and nowhere else; in both of the losses."""
    from lowrank_sys.train.trainer import LowRankTrainer

    seen, compute = [], LowRankTrainer.compute_loss

    def watched(self, model, inputs, *rest, **more):
        def keep(module, given, made):
            made.retain_grad()
            seen.append((inputs, made))

        hook = model.model.norm.register_forward_hook(keep)
        try:
            return compute(self, model, inputs, *rest, **more)
        finally:
            hook.remove()

    monkeypatch.setattr(LowRankTrainer, "compute_loss", watched)
    assert cli.main([*words("llama"), "--method", method]) == 0
    inputs, hidden = seen[-1]  # what is INT8 is rehearsed before
    labels = inputs["labels"][0]
    learned = labels != -100
    said = tokenizer().decode(labels[learned])
    answers = {message["content"] for i in range(9) for message in chat(i)["messages"][1:]}
    assert said.endswith("<|end|>") and set(said.split("<|end|>")[:-1]) <= answers
    assert (inputs["position_ids"][0] == 0).sum() > 2  # several documents
    predicts = torch.cat([learned[1:], torch.tensor([False])])
    assert torch.equal(hidden.grad[0].any(1), predicts)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["arguments"]["weights"] == (
        "int8" if method == "q-galore" else "float"
    )
