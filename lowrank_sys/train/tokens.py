"""Tokens of a corpus on the disk: written as the documents come, put in order, mapped, and kept for the next run.

The text is never in memory as a whole. What took WORTH_KEEPING to make is kept, one file a source, tokenizer and field, and used
again where the sources' names, sizes and times are the same, and its SHA-256 is still what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple

import numpy as np

BATCH_DOCUMENTS, BATCH_BYTES = 1000, 16 << 20
WORTH_KEEPING = 5.0  # seconds


class Tokens(NamedTuple):
    """stream: mapped, 1-D. valid: how many at its front are for validation, 0 where the documents were not split."""

    stream: np.ndarray
    valid: int
    documents: int
    sha256: str


def tokens(name: str, state: str | None, texts: Callable[[], Iterable[bytes]], encode: Callable[[list[bytes]], list[np.ndarray]],
           dtype: str, seq_len: int, held_out: Callable[[list[int]], set[int]]) -> Tokens:
    """Kept tokens of `name` if made of the same `state`, else those of `texts`, every text once, in the order of their SHA-256.

    held_out: sizes in bytes, in that order -> which documents come first, for validation. Not split where a side is shorter than
    `seq_len`. state: None keeps nothing.
    """
    folder = _folder() if state else None
    if folder is None:
        with tempfile.TemporaryFile() as file:
            return _mapped(file, dtype, _write(file, texts(), encode, dtype, seq_len, held_out))
    path = folder / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}-{dtype}"
    found = _kept(path, state, dtype, seq_len)
    if found is not None:
        return found
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            about = _write(file, texts(), encode, dtype, seq_len, held_out)
            made = _mapped(file, dtype, about)
            if time.perf_counter() - began < WORTH_KEEPING:
                return made
            with contextlib.suppress(OSError):  # a full disk: this run has its tokens, the next makes them anew
                path.with_suffix(".json").unlink(missing_ok=True)
                os.replace(file.name, path)
                path.with_suffix(".json").write_text(json.dumps(about | {"state": state, "sha256": made.sha256}))
            return made
        finally:
            Path(file.name).unlink(missing_ok=True)


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


def _write(file: BinaryIO, texts: Iterable[bytes], encode, dtype: str, seq_len: int, held_out) -> dict[str, Any]:
    places: dict[bytes, tuple[int, int, int]] = {}  # SHA-256 of a text -> its bytes, its first token, its tokens
    with tempfile.TemporaryFile(dir=Path(file.name).parent if isinstance(file.name, str) else None) as spool:
        start = 0
        for batch in _batches(texts, places):
            for (digest, text), ids in zip(batch.items(), encode(list(batch.values()))):
                spool.write(ids.astype(dtype, copy=False).data)
                places[digest] = len(text), start, len(ids)
                start += len(ids)
        spool.flush()
        order = [place for _, place in sorted(places.items())]
        first = held_out([size for size, _, _ in order])
        valid = sum(order[i][2] for i in first)
        least = min(valid, start - valid)
        if least >= seq_len:
            order = [order[i] for i in sorted(first)] + [place for i, place in enumerate(order) if i not in first]
        all_ids = np.memmap(spool, dtype=dtype, mode="r") if start else np.empty(0, dtype)
        for _, begin, count in order:
            file.write(all_ids[begin : begin + count].data)
        file.flush()
    return {"valid": valid if least >= seq_len else 0, "least": least, "documents": len(order)}


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
    # copy-on-write: torch takes no array that may not be written
    empty = os.fstat(file.fileno()).st_size == 0
    stream = np.empty(0, dtype) if empty else np.memmap(file, dtype=dtype, mode="c")
    return Tokens(stream, about["valid"], about["documents"], hashlib.sha256(stream.data).hexdigest())
