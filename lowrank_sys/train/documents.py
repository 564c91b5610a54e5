"""From `--data` to documents: files are recognised by what they hold, and nothing binary passes for text."""

from __future__ import annotations

import bz2
import contextlib
import glob as globbing
import gzip
import hashlib
import io
import lzma
import mmap
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowrank_sys.cli import CommandError, say
from lowrank_sys.train import rows

STDLIB = "python-stdlib"
TEXT = rows.Text("text")

# How files begin.
_PACKED = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".xz": rb"\xfd7zXZ\0", ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"}
_TABLES = {".parquet": rb"PAR1[\0-\x1f]", ".arrow": rb"ARROW1\0\0|\xff{4}..\0\0\x10\0\0\0"}
_FOREIGN = {"a zip archive": rb"PK\x03\x04", "a PDF": rb"%PDF-"}
_MARKS = {"utf-32": rb"\xff\xfe\0\0|\0\0\xfe\xff", "utf-16": rb"\xff\xfe|\xfe\xff"}  # in this order: they share a beginning
_LINES, _DELIMITED = (".jsonl", ".ndjson"), (".csv", ".tsv")

# Of bytes that are no UTF-8: western texts of one byte a letter have a few per cent, compressed data about half.
_INVALID_SHARE = 0.1
_HEAD = 1 << 16
IN_MEMORY = 64 << 20  # bytes; what is larger stays on the disk


def read(source: str, fields: rows.Text | str = TEXT) -> Iterator[bytes | mmap.mmap]:
    """The documents of `source`, one after the other, as UTF-8 (text files without a mark of UTF-16: as they are).

    A text file larger than IN_MEMORY is mapped. No text holds byte 0: rows with one are passed over. fields: what a row's document
    is made of, or the name of the field that is all of it.
    Raises CommandError for what is missing, damaged or no text. In a folder, files that are no text are passed over.
    """
    passed, fields = 0, rows.Text(fields) if isinstance(fields, str) else fields
    for text in rows.of_data_set(source, fields) if _is_data_set(source) else _of_files(source, fields):
        if text.find(b"\0", len(rows.MARK) if text[: len(rows.MARK)] == rows.MARK else 0) < 0:
            yield text
        else:
            passed += 1
    if passed:
        say(f"data: {passed:,} rows of {source} hold NUL bytes and were passed over")


def _of_files(source: str, fields: rows.Text) -> Iterator[bytes | mmap.mmap]:
    whole = source == STDLIB or Path(source).is_dir()
    passed = 0
    for path in _files(source):
        try:
            yield from _of_file(path, fields, named=not whole)
        except _NoText as flaw:
            if not whole:
                raise CommandError(f"--data {path}: it is no text: {flaw}") from None
            passed += 1
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise CommandError(f"--data {path}: cannot read it: {error}") from error
    if passed:
        say(f"data: {passed:,} files in {source} are no text and were passed over")


def fingerprint(source: str) -> str:
    """What says that the files of `source` are as they were, or the revision of a data set of Hugging Face.

    Raises CommandError.
    """
    place = rows.DATA_SET.fullmatch(source)[1] if _is_data_set(source) else source
    if place != source and not os.path.isdir(place):
        return rows.revision(source)
    digest = hashlib.sha256(os.fsencode(source))
    for path in _files(place):
        found = path.stat()
        digest.update(os.fsencode(path.resolve()) + f"\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0".encode())
    return digest.hexdigest()


class _NoText(Exception):
    """Says what was found instead."""


def _is_data_set(source: str) -> bool:
    return source != STDLIB and not os.path.exists(source) and rows.DATA_SET.fullmatch(source) is not None


def _files(source: str) -> list[Path]:
    """The files of `source`, in order."""
    if source == STDLIB:
        return list(stdlib_files())
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir():
        return list(_walk(Path(source), skip=lambda name: name.startswith(".")))
    if not globbing.has_magic(source):
        raise CommandError(
            f"--data {source}: no such file or folder; valid: {STDLIB}, a file, a folder, a glob, "
            "or name:SPLIT of a Hugging Face data set"
        )
    paths = [Path(path) for path in sorted(globbing.glob(source, recursive=True)) if os.path.isfile(path)]
    if not paths:
        raise CommandError(f"--data {source}: no file matches")
    return paths


def stdlib_files() -> Iterator[Path]:
    # packages installed beside the library are the machine's own; the tests are nearly as large as the library
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    root = Path(sysconfig.get_paths()["stdlib"])
    return (path for path in _walk(root, skip=skip.__contains__) if path.suffix == ".py")


def _walk(root: Path, skip) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (Path(folder, name) for name in sorted(names) if not skip(name) and os.path.isfile(os.path.join(folder, name)))


def _of_file(path: Path, fields: rows.Text, named: bool) -> Iterator[bytes]:
    """named: the user asked for this very file, so a .json is read as rows whatever it looks like."""
    with _opened(path) as file:
        head = file.peek(_HEAD)
        suffix = (Path(path.stem).suffix if path.suffix in _PACKED else path.suffix).lower()
        suffix = _begins(head, _TABLES) or suffix
        if suffix in _TABLES:
            yield from rows.of_table(file, path, suffix[1:], fields)
            return
        if encoding := _begins(head, _MARKS):
            try:
                content = file.read().decode(encoding).encode()
            except ValueError as error:
                raise _NoText(f"it begins as {encoding}, and is none: {error}") from error
            file, head = io.BytesIO(content), content[:_HEAD]
        _check(head)
        if suffix in _LINES:
            yield from rows.of_lines(file, path, fields)
        elif suffix in _DELIMITED:
            yield from rows.of_delimited(file, path, fields)
        elif suffix == ".json" and (named or re.match(rb"\s*\[\s*\{|\s*\{.*\}\s*\n\s*\{", head)):
            yield from rows.of_json(file, path, fields)
        else:
            text = _whole(file)
            _check(text)
            yield text


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, unpacked if it is packed, whatever its name says; a name that says so is held to it."""
    with path.open("rb") as raw:
        packed = _begins(raw.peek(16), _PACKED)
        if path.suffix in _PACKED and packed != path.suffix and raw.peek(1):
            raise OSError(f"it is no {path.suffix} file")
        with io.BufferedReader(_unpacked(raw, packed), _HEAD) if packed else raw as file:
            yield file


def _unpacked(raw: BinaryIO, packed: str) -> BinaryIO:
    if packed == ".zst":  # zstandard and fsspec take a file that was cut off for a whole one
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[packed](raw, "rb")


def _whole(file: BinaryIO) -> bytes | mmap.mmap:
    """All of the file, of which nothing was read; mapped where it is large, from a copy where it is packed."""
    content = file.read(IN_MEMORY + 1)
    if len(content) <= IN_MEMORY:
        return content
    if rows.is_plain(file):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with tempfile.TemporaryFile() as copy:
        copy.write(content)
        shutil.copyfileobj(file, copy)
        copy.flush()
        return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)


def _begins(head: bytes, kinds: dict[str, bytes]) -> str | None:
    return next((kind for kind, pattern in kinds.items() if re.match(pattern, head, re.S)), None)


def _check(content: bytes | mmap.mmap) -> None:
    if kind := _begins(content, _FOREIGN):
        raise _NoText(kind)
    if content.find(b"\0") >= 0:
        raise _NoText("it holds NUL bytes")
    start = content[: 1 << 20]
    if start.decode("utf-8", "replace").count("\ufffd") > max(1, _INVALID_SHARE * len(start)):
        raise _NoText("much of it is not UTF-8")
