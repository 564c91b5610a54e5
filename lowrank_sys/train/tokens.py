"""Tokens of a corpus on the disk: written as the documents come, put in order, mapped, and kept for the next run.

The text is never in memory as a whole. What took WORTH_KEEPING to make is kept, one file a source, tokenizer and field, and used
again where the sources' names, sizes and times are the same, and its SHA-256 is still what it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

BATCH_DOCUMENTS, BATCH_BYTES = 1000, 16 << 20
WORTH_KEEPING = 5.0  # seconds
IN_MEMORY = 64 << 20  # bytes; a smaller corpus needs no disk
PART = 64 << 20  # bytes of text; a tokenizer takes many times their memory


class Tokens(NamedTuple):
    """stream: mapped, 1-D. valid: how many at its front are for validation, 0 where the documents were not split."""

    stream: np.ndarray
    valid: int
    documents: int
    sha256: str


def tokens(
    name: str,
    state: str | None,
    texts: Callable[[], Iterable[bytes]],
    encode: Callable[[list[bytes]], list[np.ndarray]],
    dtype: str,
    seq_len: int,
    held_out: Callable[[list[int]], set[int]],
    end: Sequence[int] = (),
) -> Tokens:
    """Kept tokens of `name` if made of the same `state`, else those of `texts`, every text once, in the order of their SHA-256.

    encode: texts -> the tokens of each; it gets one larger than PART in parts. end: tokens after each text. held_out: sizes in
    bytes, in that order -> which documents come first, for validation. Not split where a side is shorter than `seq_len`.
    state: None keeps nothing.
    """
    folder = _folder() if state else None
    path = folder and folder / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}-{dtype}"
    found = path and _kept(path, state, dtype, seq_len)
    if found:
        return found
    began = time.perf_counter()
    with _file(folder) as file:
        about = _write(file, _file(folder), texts(), encode, dtype, seq_len, held_out, end)
        made = _mapped(file, dtype, about)
    if folder is None or time.perf_counter() - began < WORTH_KEEPING:
        return made
    try:
        _keep(path, made.stream, about | {"state": state, "sha256": made.sha256})
    except OSError:  # a full disk: this run has its tokens, the next makes them anew
        return made
    return _kept(path, state, dtype, seq_len) or made


def _file(folder: Path | None) -> BinaryIO:
    return tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=folder)


def _folder() -> Path | None:
    """Where tokens are kept, None where nothing may be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank-sys" / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _kept(path: Path, state: str, dtype: str, seq_len: int) -> Tokens | None:
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if about["state"] != state or (about["valid"] > 0) != (about["least"] >= seq_len):
            return None
        with path.open("rb") as file:
            found = _mapped(file, dtype, about)
        return found if found.sha256 == about["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, stream: np.ndarray, about: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(stream.data)
            file.flush()
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(file.name, path)
            path.with_suffix(".json").write_text(json.dumps(about))
        finally:
            Path(file.name).unlink(missing_ok=True)


def _write(
    file: BinaryIO, unordered: BinaryIO, texts: Iterable[bytes], encode, dtype: str, seq_len: int, held_out, end: Sequence[int]
) -> dict[str, Any]:
    places: dict[bytes, tuple[int, int, int]] = {}  # SHA-256 of a text -> its bytes, its first token, its tokens
    with unordered:
        start = 0
        for batch in _batches(texts, places):
            for (digest, text), parts in zip(batch.items(), _encoded(list(batch.values()), encode)):
                count = sum(_put(unordered, np.asarray(ids, dtype)) for ids in itertools.chain(parts, [end]))
                places[digest] = len(text), start, count
                start += count
        order = [place for _, place in sorted(places.items())]
        first = held_out([size for size, _, _ in order])
        valid = sum(order[i][2] for i in first)
        least = min(valid, start - valid)
        if least >= seq_len:
            order = [order[i] for i in sorted(first)] + [place for i, place in enumerate(order) if i not in first]
        found = _array(unordered, dtype)
        for _, begin, count in order:
            _put(file, found[begin : begin + count])
    return {"valid": valid if least >= seq_len else 0, "least": least, "documents": len(order)}


def _put(file: BinaryIO, ids: np.ndarray) -> int:
    """How many were written; a slice at a time, as a spooled file takes a whole one into memory."""
    for at in range(0, len(ids), BATCH_BYTES):
        file.write(ids[at : at + BATCH_BYTES].data)
    return len(ids)


def _encoded(texts: list[bytes], encode) -> Iterator[Iterable[np.ndarray]]:
    """The tokens of each text, in one piece or as many as it has parts."""
    if sum(map(len, texts)) <= PART:
        yield from ([ids] for ids in encode(texts))
    else:
        yield from ((encode([part])[0] for part in _parts(text)) for text in texts)


def _parts(text: bytes) -> Iterator[bytes]:
    """The text in parts of at most PART bytes, cut before white space where there is some, else between two letters."""
    start = 0
    while start < len(text):
        stop = min(start + PART, len(text))
        if stop < len(text):
            space = max(text.rfind(b" ", start + 1, stop), text.rfind(b"\n", start + 1, stop))
            stop = space if space > 0 else stop - next((i for i in range(4) if text[stop - i] & 0xC0 != 0x80), 0)
        yield text[start:stop]
        start = stop


def _batches(texts: Iterable[bytes], seen: dict[bytes, Any]) -> Iterator[dict[bytes, bytes]]:
    """Texts by their SHA-256, each once; empty ones are none."""
    batch, size = {}, 0
    for text in filter(None, texts):
        digest = hashlib.sha256(text).digest()
        if digest in seen or digest in batch:
            continue
        batch[digest] = text
        size += len(text)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _mapped(file: BinaryIO, dtype: str, about: dict[str, Any]) -> Tokens:
    stream = _array(file, dtype)
    return Tokens(stream, about["valid"], about["documents"], hashlib.sha256(stream.data).hexdigest())


def _array(file: BinaryIO, dtype: str) -> np.ndarray:
    """What the file holds, read if it is small, else mapped; copy-on-write, as torch takes no array that may not be written."""
    file.flush()
    file.seek(0, os.SEEK_END)  # returns nothing before Python 3.11
    if file.tell() > IN_MEMORY:
        return np.memmap(file, dtype=dtype, mode="c")
    file.seek(0)
    return np.frombuffer(bytearray(file.read()), dtype)
