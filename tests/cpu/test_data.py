"""Reading, splitting and ordering text for `lowrank train`."""

import gzip
import json
import math
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lowrank_sys.cli import CommandError
from lowrank_sys.train import data
from lowrank_sys.train.documents import stdlib_files
from lowrank_sys.train.rows import Text

T = 16


def write_files(folder, texts):
    for i, text in enumerate(texts):
        path = folder / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


def texts(count=100, words=30):
    return [" ".join(f"document{i}word{j}" for j in range(words)).encode() for i in range(count)]


def documents(stream):
    return bytes(stream.numpy()).split(b"\0")[:-1]


def test_split_by_document_has_no_leak(tmp_path):
    wanted = texts()
    corpus = data.load(str(write_files(tmp_path, wanted + wanted[:10])), seq_len=T)
    train, valid = documents(corpus.train), documents(corpus.valid)
    assert corpus.split == "document" and corpus.vocab == 256 and corpus.documents == 100
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(wanted)  # the ten copies count once
    assert 0.02 < len(corpus.valid) / (len(corpus.train) + len(corpus.valid)) <= data.VALID_SHARE


def test_split_depends_on_the_text_alone(tmp_path):
    one = data.load(str(write_files(tmp_path / "one", texts())), seq_len=T)
    two = data.load(str(write_files(tmp_path / "two", reversed(texts()))), seq_len=T)
    assert one.digest() == two.digest() and torch.equal(one.train, two.train)
    changed = data.load(str(write_files(tmp_path / "three", texts(words=31))), seq_len=T)
    assert changed.digest() != one.digest()


GOLDEN = [
    ("folder", False, 48380, 2371, "791d594b4d53f029c2879d265ae7d740eaba96d46791db482e6d20df3f02f060"),
    ("folder", True, 7321, 360, "97ab6a71ff4414a14d466e2fa8143e9b704235720e4bcaf755d05f157177ad32"),
    ("one.txt", False, 48213, 2538, "5798af672285653b259488bd43c607c4bf7b07918d8c1a19f2f298d8631ade45"),
    ("one.txt", True, 7108, 374, "f61f35baa52bf60c9369a5e473ca2bed60738a54a17f354d2a288ec71bc589e8"),
    ("few", False, 1130, 60, "39f1b41313ab6631549b9473802ba966899c26c642a5b86cb973cd204c9e012c"),
    ("few", True, 173, 16, "9ad35052f50b44be090fb7650031d55cbad7b5aeea4058216d0f25079eec64e1"),
]


def test_the_split_is_what_it_always_was(tmp_path):
    """Another split would mix validation texts of old runs into the training of new ones."""
    wanted = [f"document {i}: " + " ".join(f"word{i * j % 97}" for j in range(20 + i % 31)) + "\r\né" for i in range(200)]
    for folder, some in (("folder", wanted), ("few", wanted[:7])):
        write_files(tmp_path / folder, [text.encode() for text in some])
    (tmp_path / "one.txt").write_bytes("\n".join(wanted).encode())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wanted))
    pyarrow.parquet.write_table(pyarrow.table({"text": wanted}), tmp_path / "rows.parquet")
    words = dict.fromkeys(word for text in wanted for word in text.split())
    tokenizer = save_tokenizer(tmp_path / "tokenizer", {"<unk>": 0, "</s>": 1, **{word: i + 2 for i, word in enumerate(words)}})
    for name, by_words, train, valid, digest in GOLDEN:
        for source in [name, "rows.jsonl", "rows.parquet"] if name == "folder" else [name]:
            corpus = data.load(str(tmp_path / source), seq_len=T, tokenizer=tokenizer if by_words else None)
            assert (len(corpus.train), len(corpus.valid), corpus.digest()) == (train, valid, digest), (source, by_words)


def test_single_file_is_cut_by_position(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 128)) * 80)
    corpus = data.load(str(path), seq_len=T)
    assert corpus.split == "position"
    assert bytes(corpus.train.numpy()) + bytes(corpus.valid.numpy()) == path.read_bytes() + b"\0"
    assert len(corpus.valid) == round(data.VALID_SHARE * (path.stat().st_size + 1))


def test_one_large_file_among_small_ones_is_not_held_out(tmp_path):
    corpus = data.load(str(write_files(tmp_path, [b"large " * 5000, b"a", b"b"])), seq_len=T)
    assert corpus.split == "position" and len(corpus.train) > 0.9 * 30000


def test_python_stdlib_leaves_tests_and_installed_packages_out():
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in stdlib_files()]
    left_out = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
    assert len(paths) > 300 and not [p for p in paths if left_out & set(p.parts)]
    assert Path("argparse.py") in paths and Path("json/decoder.py") in paths


def test_every_format_gives_the_same_documents(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [text.decode() for text in texts(50)]
    lines = "".join(json.dumps({"id": i, "body": row}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "set").mkdir()
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "set" / "train.jsonl").write_text(lines)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "rows.parquet")
    write_files(tmp_path / "folder", texts(50))
    sources = ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "set:train", "folder", "folder/**/*.txt"]
    digests = {s: data.load(str(tmp_path / s), seq_len=T, field="body").digest() for s in sources}
    assert len(set(digests.values())) == 1, digests
    half = list(data.read(f"{tmp_path / 'set'}:train[:50%]", Text("body")))
    assert [text.decode() for text in half] == rows[:25]


def test_folders_pass_over_hidden_and_binary_files(tmp_path):
    write_files(tmp_path, [b"text"])
    (tmp_path / ".hidden").write_bytes(b"hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert list(data.read(str(tmp_path))) == [b"text"]


def save_tokenizer(folder, vocab):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def test_tokenizer(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, **{f"document{i}word{j}": 2 + 30 * i + j for i in range(100) for j in range(30)}}
    tokenizer = save_tokenizer(tmp_path / "tokenizer", vocab)
    corpus = data.load(str(write_files(tmp_path / "text", texts())), seq_len=T, tokenizer=tokenizer)
    assert corpus.vocab == len(vocab) and corpus.train.dtype == torch.int32
    both = torch.cat([corpus.train, corpus.valid])
    assert len(both) == 100 * 31 and (both == 1).sum() == 100 and not (both == 0).any()


def bad_sources(folder):
    (folder / "empty.txt").touch()
    (folder / "nothing").mkdir()
    (folder / "short.txt").write_text("too short")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "other.jsonl").write_text('{"body": "a", "id": 1}\n')
    (folder / "broken.parquet").write_text("not parquet")
    (folder / "broken.txt.gz").write_text("not gzip")
    return {
        "missing.txt": "no such file or folder; valid: python-stdlib, a file",
        "*.md": "no file matches",
        "empty.txt": "it holds no text",
        "nothing": "it holds no text",
        "short.txt": "it holds 10 tokens; --seq-len 16 needs at least 32",
        "broken.jsonl": "line 2 is not JSON",
        "list.jsonl": "line 1 is a list, not an object",
        "other.jsonl": "no text in the field 'text'; fields: body, id (see --text-field)",
        "broken.parquet": "it is not Parquet",
        "broken.txt.gz": "cannot read it",
        "nothing:train": "datasets cannot load it",
    }


def test_bad_data_is_one_clear_line(tmp_path):
    for source, words in bad_sources(tmp_path).items():
        with pytest.raises(CommandError) as caught:
            data.load(str(tmp_path / source), seq_len=T)
        message = str(caught.value)
        assert words in message and message.startswith("--data ") and "\n" not in message, (source, message)
        assert caught.value.code == 2


def test_bad_tokenizer(tmp_path):
    with pytest.raises(CommandError, match="--tokenizer .*: cannot load it"):
        data.load(data.STDLIB, seq_len=T, tokenizer=str(tmp_path))


def test_windows_are_a_function_of_seed_and_index():
    stream = torch.arange(10 * T + 5) % 256
    run = data.Windows(stream.to(torch.uint8), T, seed=3, length=40)
    first, second = [[int(run[i][0]) for i in range(start, start + 10)] for start in (0, 10)]
    assert sorted(first) == sorted(second) == sorted(stream[: 10 * T : T].tolist())  # each pass sees every window once
    assert first != second
    late = data.Windows(stream.to(torch.uint8), T, seed=3, length=40)
    assert torch.equal(late[27], run[27]) and late[27].dtype == torch.int64 and late[27].shape == (T,)
    other = data.Windows(stream.to(torch.uint8), T, seed=4, length=40)
    assert [int(other[i][0]) for i in range(10)] != first


def test_sample_is_spread_and_bounded():
    stream = torch.arange(1000)
    windows = data.Windows(stream, 10, 0, 0)
    some = windows.sample(200)["input_ids"]
    assert some.shape == (20, 10) and some[:, 0].tolist() == list(range(0, 1000, 50))
    assert windows.sample(10**6)["labels"].shape == (100, 10)
    assert windows.sample(1)["labels"].shape == (1, 10)


def test_unigram_entropy():
    stream = torch.tensor([0, 0, 0, 1], dtype=torch.uint8)  # with one added to each count: 4, 2, 1 and 1 of 8
    found = data.unigram_entropy(stream, torch.tensor([[0, 1], [2, 0]]), vocab=4)
    assert found == pytest.approx(-(2 * math.log(4 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 4)
