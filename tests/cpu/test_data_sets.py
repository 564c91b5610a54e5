"""Data sets of Hugging Face by name: what is streamed, what is prepared and kept, and what is read again."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from lowrank_sys.cli import CommandError
from lowrank_sys.train import data, documents, rows, tokens

TEXTS = [f"row {i} " * 9 for i in range(60)]
ABOUT = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.jsonl
dataset_info:
  config_name: default
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: {size}
    num_examples: 60
  download_size: {size}
  dataset_size: {size}
---
"""


def write(folder, texts=TEXTS, size=None):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if size:
        (folder / "README.md").write_text(ABOUT.format(size=size))
    return f"{folder}:train"


def read(source):
    return [text.decode() for text in documents.read(source)]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where `datasets` keeps what it prepares."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """some/set: a data set that is no folder here."""
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, *a, **k: load(str(tmp_path / "set"), *a, **k))
    return "some/set:train"


@pytest.mark.parametrize("size", [None, 5000, 1 << 60])
def test_a_folder_is_read_as_it_is_now_and_leaves_no_copy(tmp_path, kept, size):
    for texts in (TEXTS, [text.upper() for text in TEXTS]):
        source = write(tmp_path / "set", texts, size)
        assert read(source) == texts and read(f"{source}[:50%]") == texts[:30] and read(f"{source}[50:]") == texts[50:]
    assert not kept.exists() and {path.name for path in (tmp_path / "set").iterdir()} <= {"train.jsonl", "README.md"}


@pytest.mark.parametrize("part, wanted", [("", TEXTS), ("[:7]", TEXTS[:7]), ("[25%:75%]", TEXTS[15:45]), ("[58:]", TEXTS[58:])])
def test_what_is_larger_than_the_memory_is_streamed(tmp_path, kept, remote, part, wanted, monkeypatch):
    write(tmp_path / "set", size=1 << 60)
    assert read(remote + part) == wanted and not list(kept.glob("**/*.arrow"))
    write(tmp_path / "set", size=5000)
    prepared = datasets.load_dataset_builder("some/set")
    prepared.download_and_prepare(verification_mode="no_checks")  # the sizes are made up
    assert read(remote + part) == wanted and list(kept.glob("**/*.arrow"))
    monkeypatch.setattr(rows, "available_bytes", lambda: 0)
    monkeypatch.setattr(datasets.DatasetBuilder, "as_streaming_dataset", lambda *a: pytest.fail("it is loaded once more"))
    assert read(remote + part) == wanted


def test_tokens_of_a_data_set_are_kept_until_it_changes(tmp_path, remote, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 0.0)
    write(tmp_path / "set")
    before = data.load(remote, seq_len=16)
    with monkeypatch.context() as patch:
        patch.setattr(rows, "of_data_set", lambda *a: pytest.fail("it is read again"))
        assert data.load(remote, seq_len=16).digest() == before.digest()
    write(tmp_path / "set", [text + "more" for text in TEXTS])
    os.utime(tmp_path / "set" / "train.jsonl", (5, 5))
    assert data.load(remote, seq_len=16).digest() != before.digest()
    local = data.load(f"{tmp_path / 'set'}:train", seq_len=16)
    write(tmp_path / "set")
    assert data.load(f"{tmp_path / 'set'}:train", seq_len=16).digest() == before.digest() != local.digest()


@pytest.mark.full
def test_offline_what_was_prepared_is_read(tmp_path):
    """In a process of its own: the library looks at HF_DATASETS_OFFLINE once."""
    write(tmp_path / "set")
    program = "import sys; from lowrank_sys.train import documents; print(len(list(documents.read(sys.argv[1]))))"
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    prepare = "import datasets; datasets.load_dataset('set', split='train')"
    subprocess.run([sys.executable, "-c", prepare], cwd=tmp_path, env=env, check=True, capture_output=True)
    (tmp_path / "set").rename(tmp_path / "gone")
    for source, count in (("set:train", "60"), ("set:train[:10]", "10"), ("set:default:train", "60")):
        done = subprocess.run([sys.executable, "-c", program, source], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == count, done.stderr


@pytest.mark.parametrize(
    "write_rows, part, words",
    [
        (
            lambda path: path.write_text('{"text": "a"}\n{"text": 5}\n'),
            ":train",
            "row 2: no text in the field 'text'; fields: text",
        ),
        (lambda path: path.write_text('{"text": "a"}\n{"text"\n'), ":train", "datasets cannot load it: JSON parse error"),
        (lambda path: path.write_text('{"body": "a"}\n'), ":train", "no text in the field 'text'; fields: body"),
        (lambda path: path.write_text('[{"body": "a"}]'), ":train", "no text in the field 'text'; fields: body"),
        (lambda path: path.write_text('{"text": "a"}\n'), ":valid", "datasets cannot load it: Bad split: valid"),
        (
            lambda path: path.write_text('{"text": "a"}\n'),
            ":other:train",
            "datasets cannot load it: BuilderConfig 'other' not found",
        ),
        (lambda path: path.rename(path.with_name("x.bin")), ":train", "datasets cannot load it"),
    ],
)
def test_bad_data_sets_are_one_line(tmp_path, write_rows, part, words, capfd):
    write(tmp_path / "set")
    write_rows(tmp_path / "set" / "train.jsonl")
    with pytest.raises(CommandError) as caught:
        read(f"{tmp_path / 'set'}{part}")
    message = str(caught.value)
    assert words in message and message.startswith(f"--data {tmp_path / 'set'}") and caught.value.code == 2
    assert "\n" not in message and len(message) < 600 and capfd.readouterr() == ("", "")


def test_a_binary_row_is_passed_over(tmp_path, capsys):
    assert read(write(tmp_path / "set", ["a", "b\0", "c"])) == ["a", "c"]
    assert "1 rows of" in capsys.readouterr().err
