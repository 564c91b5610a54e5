"""Tokens on the disk: what is kept, when it is used again, and that no more than a batch of the text is in memory."""

import json
import os

import pytest

from lowrank_sys.train import data, documents, tokens

T = 16


@pytest.fixture(params=[0, 1 << 30], ids=["mapped", "in memory"])
def kept(tmp_path, monkeypatch, request):
    """The folder of kept tokens; everything is worth keeping."""
    monkeypatch.setattr(tokens, "IN_MEMORY", request.param)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 0.0)
    return tmp_path / "cache" / "lowrank-sys" / "tokens"


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"document {i} " * 20)
    return folder


def unread(monkeypatch):
    def fail(*args):
        raise AssertionError("the sources are read again")

    monkeypatch.setattr(data, "read", fail)


def test_kept_tokens_are_the_same_and_read_nothing(text, kept, monkeypatch):
    made = data.load(str(text), seq_len=T)
    assert len(list(kept.iterdir())) == 2
    unread(monkeypatch)
    again = data.load(str(text), seq_len=T)
    assert made.digest() == again.digest() and made[2:] == again[2:] and made.split == "document"
    with pytest.raises(AssertionError, match="read again"):
        data.load(str(text), seq_len=T, field="body")


def change(path):
    path.write_text(path.read_text().upper())  # of the same size


def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("how", [change, touch, lambda path: path.unlink(), lambda path: path.rename(path.with_name("x.txt"))])
def test_changed_sources_are_read_again_and_replace_what_was_kept(text, kept, how, monkeypatch):
    before = data.load(str(text), seq_len=T)
    stream = bytes(before.train.numpy())
    how(text / "7.txt")
    after = data.load(str(text), seq_len=T)
    assert (before.digest() != after.digest()) == (how is change or after.documents < before.documents)
    assert len(list(kept.iterdir())) == 2
    assert bytes(before.train.numpy()) == stream  # what a run has mapped stays


def test_damaged_tokens_are_made_anew(text, kept):
    right = data.load(str(text), seq_len=T).digest()
    [file] = [path for path in kept.iterdir() if path.suffix != ".json"]
    about = file.with_suffix(".json")
    for damaged, content in (
        (file, b"\7" + file.read_bytes()[1:]),
        (file, file.read_bytes()[:-5]),
        (file, b""),
        (about, b"{"),
        (about, b"[]"),
        (about, json.dumps({"state": None}).encode()),
    ):
        damaged.write_bytes(content)
        assert data.load(str(text), seq_len=T).digest() == right


def test_a_longer_window_may_split_in_another_way(text, kept, monkeypatch):
    assert data.load(str(text), seq_len=T).split == "document"
    by_position = data.load(str(text), seq_len=2000)
    assert by_position.split == "position"
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept / "other"))
    assert data.load(str(text), seq_len=2000).digest() == by_position.digest()


def test_nothing_is_kept_that_is_quick_or_where_nothing_may_be_written(text, kept, monkeypatch):
    right = data.load(str(text), seq_len=T).digest()
    for path in kept.iterdir():
        path.unlink()
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 1e9)
    assert data.load(str(text), seq_len=T).digest() == right and not list(kept.iterdir())
    for nowhere in ("/dev/null/cache", "/proc/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        assert data.load(str(text), seq_len=T).digest() == right


def test_texts_come_in_batches(monkeypatch):
    import numpy as np

    monkeypatch.setattr(tokens, "BATCH_BYTES", 1000)
    sizes = []

    def encode(texts):
        sizes.append(sum(map(len, texts)))
        return [np.frombuffer(text, np.uint8) for text in texts]

    texts = [bytes([1 + i % 100, 1 + i // 100]) * 50 for i in range(2000)]
    made = tokens.tokens("name", None, lambda: iter(texts * 2), encode, "uint8", T, data._held_out)
    assert made.documents == 2000 and len(made.stream) == 200_000 and max(sizes) <= 1100 and len(sizes) >= 180


@pytest.mark.parametrize(
    "text", ["words and words\nlines " * 40, "数据" * 300, "é" * 301, "x" * 1000, "a" * 99 + " " + "b" * 99, " " * 500]
)
@pytest.mark.parametrize("size", [100, 101, 102, 103])
def test_parts_are_the_text(text, size, monkeypatch):
    monkeypatch.setattr(tokens, "PART", size)
    parts = list(tokens._parts(text.encode()))
    assert b"".join(parts) == text.encode() and max(map(len, parts)) <= size and len(parts) <= 2 + 2 * len(text.encode()) // size
    assert "".join(part.decode() for part in parts) == text  # no letter is cut
    garbage = b"\x80" * 999
    assert b"".join(tokens._parts(garbage)) == garbage


def byte_level(folder, text):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<end>"]
    made.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("document", ["one line of words, ", "many\nlines\nof words\n", "  indented\n\n  code = {1: 2}\n"])
def test_a_large_document_has_the_tokens_of_a_small_one(tmp_path, document, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"{document}{i}" for i in range(900)))
    for tokenizer in (None, byte_level(tmp_path / "t", document * 50)):
        whole = data.load(str(tmp_path / "a.txt"), seq_len=T, tokenizer=tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "PART", 1000)
            patch.setattr(documents, "IN_MEMORY", 1000)
            assert data.load(str(tmp_path / "a.txt"), seq_len=T, tokenizer=tokenizer).digest() == whole.digest()


def test_an_encoder_sees_no_more_than_a_part(monkeypatch):
    import numpy as np

    monkeypatch.setattr(tokens, "PART", 1000)
    seen = []

    def encode(texts):
        seen.append(sum(map(len, texts)))
        return [np.frombuffer(text, np.uint8) for text in texts]

    texts = [b"a" * 50, b"b" * 10_000, b"c" * 999, b"d"]
    made = tokens.tokens("name", None, lambda: texts, encode, "uint8", T, lambda sizes: set(), [0])
    assert max(seen) == 1000 and sum(seen) == sum(map(len, texts))
    assert sorted(bytes(made.stream).split(b"\0")) == [b"", *texts]
