"""From `--data` to two token streams, training and validation, that share no document.

A document is a text file, or one row of JSON lines, Parquet or a Hugging Face data set. Identical documents count once.
Documents are ordered by their SHA-256, which shuffles them the same way on every machine; about VALID_SHARE of the
bytes, whole documents from the front of that order, are the validation set. Where no whole documents make a side of
that size, as with a single file, the stream is cut by position instead, without overlap.
"""

from __future__ import annotations

import glob as globbing
import gzip
import hashlib
import json
import os
import re
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, NamedTuple

from lowrank_sys.cli import CommandError

if TYPE_CHECKING:
    import torch

VALID_SHARE = 0.05
STDLIB = "python-stdlib"
ROW_FORMATS = (".jsonl", ".ndjson", ".parquet")


class Corpus(NamedTuple):
    """train, valid: token ids, (n,) uint8 for byte tokens, else int32. vocab: tokens in the vocabulary."""

    train: torch.Tensor
    valid: torch.Tensor
    vocab: int
    split: str  # "document" or "position"
    documents: int

    def digest(self) -> str:
        """SHA-256 of both streams: the same data, the same split, the same tokens."""
        digest = hashlib.sha256()
        for stream in (self.train, self.valid):
            digest.update(stream.numpy().data)
            digest.update(b"|")
        return digest.hexdigest()


def load(source: str, *, seq_len: int, tokenizer: str | None = None, field: str = "text") -> Corpus:
    """Read `source`, split it and turn it into tokens; the whole corpus is held in memory.

    source: `python-stdlib`, a file, a folder, a glob, or `name:SPLIT` (`name:CONFIG:SPLIT`) of a Hugging Face data set.
    seq_len: tokens in a window; both sides get at least one. tokenizer: name or folder of a Hugging Face tokenizer,
    None for byte tokens 0..255. field: the column of rows that holds the text.
    Raises CommandError for data that is missing, empty, unreadable or too short.
    """
    encode, vocab = _bytes_encoder() if tokenizer is None else _tokenizer_encoder(tokenizer)
    documents = list({hashlib.sha256(d).digest(): d for d in read(source, field) if d}.items())
    if not documents:
        raise CommandError(f"--data {source}: it holds no text")
    texts = [text for _, text in sorted(documents)]

    held_out = _held_out([len(text) for text in texts])
    train = encode([text for i, text in enumerate(texts) if i not in held_out])
    valid = encode([text for i, text in enumerate(texts) if i in held_out])
    split = "document"
    if min(len(train), len(valid)) < seq_len:
        stream = encode(texts)
        cut = max(round(len(stream) * VALID_SHARE), seq_len)
        train, valid = stream[:-cut], stream[-cut:]
        split = "position"
        if len(stream) < 2 * seq_len:
            raise CommandError(
                f"--data {source}: it holds {len(stream)} tokens; --seq-len {seq_len} needs at least {2 * seq_len}, "
                "one window to train on and one for validation"
            )
    return Corpus(train, valid, vocab, split, len(texts))


def read(source: str, field: str = "text") -> Iterator[bytes]:
    """The documents of `source`, one after the other, as UTF-8 (text files: as they are)."""
    if source == STDLIB:
        yield from (path.read_bytes() for path in _stdlib_files())
    elif Path(source).is_file():
        yield from _read_file(Path(source), field)
    elif Path(source).is_dir():
        for path in _walk(Path(source), skip=lambda name: name.startswith(".")):
            if path.suffix == ".parquet" or not _is_binary(path):
                yield from _read_file(path, field)
    elif globbing.has_magic(source) and not _DATA_SET.fullmatch(source):
        paths = sorted(path for path in globbing.glob(source, recursive=True) if os.path.isfile(path))
        if not paths:
            raise CommandError(f"--data {source}: no file matches")
        for path in paths:
            yield from _read_file(Path(path), field)
    elif _DATA_SET.fullmatch(source):
        yield from _read_data_set(source, field)
    else:
        raise CommandError(
            f"--data {source}: no such file or folder; valid: {STDLIB}, a file, a folder, a glob, "
            "or name:SPLIT of a Hugging Face data set"
        )


# name:SPLIT or name:CONFIG:SPLIT, where SPLIT may be a slice, train[:1%]
_DATA_SET = re.compile(r"[^:*?\[\]]+(:[\w.-]+)?:\w+(\[[\d:%]+\])?")


def _stdlib_files() -> Iterator[Path]:
    # packages installed beside the library are the machine's own; the tests are nearly as large as the library
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    root = Path(sysconfig.get_paths()["stdlib"])
    return (path for path in _walk(root, skip=skip.__contains__) if path.suffix == ".py")


def _walk(root: Path, skip) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (Path(folder, name) for name in sorted(files) if not skip(name))


def _is_binary(path: Path) -> bool:
    with _open(path) as file:
        return b"\0" in file.read(8192)  # git's rule


def _read_file(path: Path, field: str) -> Iterator[bytes]:
    try:
        suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if suffix not in ROW_FORMATS:
            with _open(path) as file:
                yield file.read()
        elif suffix == ".parquet":
            yield from _read_parquet(path, field)
        else:
            yield from _read_json_lines(path, field)
    except (OSError, EOFError) as error:
        raise CommandError(f"--data {path}: cannot read it: {error}") from error


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_json_lines(path: Path, field: str) -> Iterator[bytes]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CommandError(f"--data {path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise CommandError(f"--data {path}: line {number} is a {type(row).__name__}, not an object")
            yield _text(row.get(field), field, list(row), f"{path}: line {number}")


def _read_parquet(path: Path, field: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if field not in columns:
            _text(None, field, columns, str(path))
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _text(value, field, columns, str(path))
    except pyarrow.ArrowInvalid as error:
        raise CommandError(f"--data {path}: it is not Parquet: {error}") from error


def _read_data_set(source: str, field: str) -> Iterator[bytes]:
    import datasets

    name, *config, split = re.split(r":(?![^\[]*\])", source)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # the library raises a dozen types for a wrong name, split or no network
        raise CommandError(f"--data {source}: datasets cannot load it: {error}") from error
    if field not in rows.column_names:
        _text(None, field, rows.column_names, source)
    for batch in rows.select_columns([field]).iter(batch_size=1000):
        for value in batch[field]:
            yield _text(value, field, rows.column_names, source)


def _text(value, field: str, columns: list[str], where: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    raise CommandError(f"--data {where}: no text in the field {field!r}; fields: {', '.join(columns)} (see --text-field)")


def _held_out(sizes: list[int]) -> set[int]:
    """Which documents are the validation set: the first ones that fit into VALID_SHARE of the bytes; maybe none."""
    budget, taken, chosen = VALID_SHARE * sum(sizes), 0, set()
    for index, size in enumerate(sizes):
        if taken + size <= budget:
            chosen.add(index)
            taken += size
        elif taken > budget / 2:
            break
    return chosen


def _bytes_encoder():
    import torch

    def encode(texts: list[bytes]) -> torch.Tensor:
        # byte 0, which text does not hold, ends a document
        joined = bytearray().join(text + b"\0" for text in texts)
        return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)

    return encode, 256


def load_tokenizer(name: str):
    """The Hugging Face tokenizer `name`, or of a folder. Raises CommandError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as with data sets: no such name, no network, a broken file
        raise CommandError(f"--tokenizer {name}: cannot load it: {error}") from error


def _tokenizer_encoder(name: str):
    import torch

    tokenizer = load_tokenizer(name)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(texts: list[bytes]) -> torch.Tensor:
        pieces: Iterable[list[int]] = (
            ids + end
            for start in range(0, len(texts), 1000)
            for ids in tokenizer(
                [text.decode("utf-8", "replace") for text in texts[start : start + 1000]],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        )
        chunks = [torch.tensor(ids, dtype=torch.int32) for ids in pieces]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int32)

    return encode, len(tokenizer)


class Windows:
    """The training windows of a whole run, in order: item i is the i-th window that the run reads.

    The stream is cut into windows of `seq_len` tokens; every pass over them is a fresh permutation that depends only on
    (seed, pass), so a resumed run continues at item i without replaying anything.
    """

    def __init__(self, stream: torch.Tensor, seq_len: int, seed: int, length: int):
        self.windows = windows(stream, seq_len)
        self.seed = seed
        self.length = length
        self._pass, self._order = -1, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Token ids, (seq_len,) int64."""
        import torch

        number, position = divmod(index, len(self.windows))
        if number != self._pass:
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:7], "big")
            self._order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
            self._pass = number
        return self.windows[self._order[position]].long()


def windows(stream: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The stream, (n,), cut into whole windows, (n // seq_len, seq_len); a view."""
    count = len(stream) // seq_len
    return stream[: count * seq_len].view(count, seq_len)


def sample(stream: torch.Tensor, seq_len: int, tokens: int) -> torch.Tensor:
    """Evenly spaced windows of `stream`, about `tokens` tokens in all, at least one: (count, seq_len) int64."""
    import torch

    every = windows(stream, seq_len)
    count = min(len(every), max(1, tokens // seq_len))
    return every[torch.arange(count) * len(every) // count].long()


def unigram_entropy(stream: torch.Tensor, targets: torch.Tensor, vocab: int) -> float:
    """Nats a token that `targets` cost under the token frequencies of `stream` (every count one higher, so none is 0).

    This is what a model that ignores all context would reach: the yardstick for a validation loss.
    """
    import torch

    counts = sum(torch.bincount(part.long(), minlength=vocab) for part in stream.split(1 << 22)) + 1
    nats = -(counts.double() / counts.sum()).log()
    return nats[targets.flatten()].mean().item()
