"""Conversations: which tokens are learned, how documents share a window, and that they do not see each other."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lowrank_sys.cli import CommandError
from lowrank_sys.train import data
from lowrank_sys.train.chats import FIRST, Chats, Encoder, marked, unmarked
from lowrank_sys.train.packing import IGNORED, Packed
from lowrank_sys.train.rows import MARK

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Shows what an answer thought only where it is the last message.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "what"}, {"role": "assistant", "content": "that"},
    {"role": "user", "content": "and"}, {"role": "assistant", "content": "so"},
]  # fmt: skip


def tokenizer(template=CHATML):
    """One token a character, and the marks."""
    letters = {chr(i): i - 31 for i in range(32, 127)}
    backend = Tokenizer(models.WordLevel({"[unk]": 0, **letters}, unk_token="[unk]"))
    backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]", eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<think>"]})
    made.chat_template = template
    return made


@pytest.fixture
def folder(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def learned_text(made, document):
    ids, learned, first = unmarked(Encoder(made, "t")([document])[0])
    assert first.nonzero()[0].tolist() == [0]
    return made.decode(ids), made.decode(ids[learned])


def document(row):
    return Chats("text").document(row, list(row), "here")


SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("row", [
    {"messages": MESSAGES},
    {"conversations": [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in MESSAGES]},
    {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    {"messages": json.dumps(MESSAGES), "other": 1},
], ids=["openai", "sharegpt", "lists", "text of a table"])  # fmt: skip
def test_the_assistant_is_learned_with_what_ends_it(row):
    whole, learned = learned_text(tokenizer(), document(row))
    assert whole == "<|system|>s<|end|><|user|>what<|end|><|assistant|>that<|end|><|user|>and<|end|><|assistant|>so<|end|>"
    assert learned == "that<|end|>so<|end|>"


def test_an_answer_that_is_shown_otherwise_at_the_end():
    whole, learned = learned_text(tokenizer(THINKING), document({"messages": MESSAGES}))
    assert whole.count("<think>") == 1
    assert learned == "that<|end|><think>so<|end|>"


def test_a_prompt_is_given_and_its_completion_learned():
    assert learned_text(tokenizer(), document({"prompt": "1+1=", "completion": "2"})) == ("1+1=2<|end|>", "2<|end|>")


def test_a_text_is_learned_but_for_its_first_token():
    assert learned_text(tokenizer(), b"text") == ("text<|end|>", "ext<|end|>")


def test_a_row_without_a_conversation_is_its_text():
    assert document({"text": "plain", "messages": None}) == b"plain"


@pytest.mark.parametrize("row, wanted", [
    ({"messages": "no"}, "a conversation must be a list of messages, got 'no'"),
    ({"messages": [{"role": "user"}]}, "message 1 must have a role and content, or from and value, got role"),
    ({"title": "t"}, "no text in the field 'text'; fields: title"),
], ids=str)  # fmt: skip
def test_bad_rows(row, wanted):
    with pytest.raises(CommandError, match=f"--data here.*{wanted}"):
        document(row)


def test_templates_that_cannot():
    hides = "{% for m in messages %}<|{{ m['role'] }}|>{{ loop.index0 if loop.last else '' }}{% endfor %}"
    with pytest.raises(CommandError, match="--tokenizer t: its chat template does not show the answers"):
        learned_text(tokenizer(hides), document({"messages": MESSAGES}))
    none = tokenizer()
    none.chat_template = None
    with pytest.raises(CommandError, match="--tokenizer t: its chat template cannot take a conversation"):
        learned_text(none, document({"messages": MESSAGES}))


# --- from files to windows


def chat(i):
    return {"messages": [{"role": "user", "content": "q" * (1 + i)}, {"role": "assistant", "content": f"a{i}" + "z" * (i % 5)}]}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_chats_are_split_by_document(tmp_path, folder, kind):
    rows = [chat(i) for i in range(9)]
    path = written(tmp_path / "c.jsonl", rows)
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path := str(tmp_path / "c.parquet"))
    corpus = data.load(path, seq_len=64, tokenizer=folder, chats=True)
    assert (corpus.split, corpus.documents) == ("document", 9)
    counts = [int(unmarked(part.numpy())[2].sum()) for part in (corpus.train, corpus.valid)]
    assert sum(counts) == 9 and counts[1] >= 1
    other = data.load(path, seq_len=64, tokenizer=folder, chats=True, valid=written(tmp_path / "v.jsonl", [chat(40)]))
    assert other.split == "file" and int(unmarked(other.valid.numpy())[2].sum()) == 1
    with pytest.raises(CommandError, match="it holds one document; one more is needed for validation"):
        data.load(written(tmp_path / "one.jsonl", rows[:1]), seq_len=64, tokenizer=folder, chats=True)


def stream(lengths, given=2):
    ids = iter(range(1, 10**6))
    return torch.from_numpy(np.concatenate([
        marked([next(ids) for _ in range(n)], [i >= given for i in range(n)]) for n in lengths
    ]))  # fmt: skip


def test_windows_hold_whole_documents_as_they_fit():
    lengths = [5, 3, 9, 2, 8, 4, 30, 6]
    packed = Packed(stream(lengths), 10, seed=0, length=100)
    assert (packed.cut, packed.left_out) == (1, 1)  # of 30 tokens, and of 2 of which none is learned
    seen = sorted((end - start for window in packed.windows for start, end in window), reverse=True)
    assert seen == [10, 9, 8, 6, 5, 4, 3]
    assert len(packed.windows) == 5 and all(sum(e - s for s, e in window) <= 10 for window in packed.windows)
    assert packed.tokens == sum(seen) / 5 and packed.learned == sum(n - 2 for n in seen)
    for i in range(len(packed.windows)):
        window = packed.window(i)
        begins = (window["position_ids"] == 0).nonzero().flatten().tolist()
        assert len(begins) == len(packed.windows[i]) + (sum(e - s for s, e in packed.windows[i]) < 10)
        assert all(window["labels"][at] == IGNORED for at in begins)
        learned = window["labels"] != IGNORED
        assert torch.equal(window["labels"][learned], window["input_ids"][learned])


@pytest.mark.parametrize("pack", [True, False])
def test_a_long_text_goes_on_in_further_windows(pack):
    """Each begins with the last token of the one before, so that every token but the first is learned once."""
    lengths = [31, 4, 10, 11]
    packed = Packed(stream(lengths, given=1), 10, seed=0, length=1, pack=pack)
    assert (packed.cut, packed.left_out) == (0, 0) and packed.learned == sum(lengths) - len(lengths)
    shown, learned = [], []
    for i in range(len(packed.windows)):
        window = packed.window(i)
        assert all(window["labels"][at] == IGNORED for at in (window["position_ids"] == 0).nonzero().flatten())
        shown += [int(token) for token in window["input_ids"] if token]
        learned += [int(token) for token in window["labels"] if token != IGNORED]
    first = {1, 32, 36, 46}
    assert sorted(learned) == sorted(set(range(1, 57)) - first)
    assert sorted(shown) == sorted([*range(1, 57), 10, 19, 28, 55])


def test_a_pass_shows_every_window_once_in_an_order_of_its_own():
    packed = Packed(stream([7] * 12), 10, seed=3, length=36)
    passes = [[packed[i]["input_ids"][0].item() for i in range(12 * p, 12 * p + 12)] for p in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and passes[0] != passes[1]
    again = Packed(stream([7] * 12), 10, seed=3, length=36)
    assert again[20]["input_ids"].equal(packed[20]["input_ids"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=130,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_documents_of_a_window_do_not_see_each_other(model):
    window = Packed(stream([6, 5, 7]), 20, seed=0, length=1).window(0)
    inputs = {name: values[None] for name, values in window.items() if name != "labels"}
    before = model(**inputs).logits
    first = (window["position_ids"] == 0).nonzero().flatten()[1]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, :first] += 50
    after = model(**inputs).logits
    assert torch.equal(before[0, first:], after[0, first:])
    assert not torch.equal(before[0, :first], after[0, :first])


def test_nothing_is_learned_of_what_is_given(model):
    window = Packed(stream([6, 5, 7]), 20, seed=0, length=1).window(0)
    inputs = {name: values[None] for name, values in window.items()}
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.detach().requires_grad_()
    model.loss_function(logits, inputs["labels"], vocab_size=130).backward()
    learned = torch.cat([window["labels"][1:] != IGNORED, torch.tensor([False])])
    assert torch.equal(logits.grad[0].any(1), learned)


def test_packed_or_not_a_token_has_the_same_loss(model):
    lengths = [6, 5, 7, 9, 4, 11]
    sums = []
    for pack in (True, False):
        packed = Packed(stream(lengths), 20, seed=0, length=1, pack=pack)
        batch = packed.sample(10**6)
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        sums.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED))
        assert int((labels != IGNORED).sum()) == sum(lengths) - 2 * len(lengths)
    torch.testing.assert_close(*sums, rtol=1e-6, atol=0)


def test_marks_are_lossless():
    ids, learned = [0, 5, FIRST - 1, 7], [True, False, True, False]
    back, kept, first = unmarked(marked(ids, learned))
    assert back.tolist() == ids and kept.tolist() == [False, False, True, False] and first.tolist() == [True, False, False, False]
    assert MARK.startswith(b"\0")
