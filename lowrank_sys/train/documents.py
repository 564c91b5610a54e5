"""From `--data` to documents: files recognised by what they hold, rows of tables, data sets of Hugging Face.

Nothing binary passes for text. Parquet, Arrow and data sets by name are read by `datasets`, as streams where that saves a copy.
JSON and CSV are read here: the builders of `datasets` name no line in their errors, turn texts that look like dates into dates
and numbers beside texts into texts, refuse rows whose fields differ, and crash on deep nesting. So is zstandard, by pyarrow: for
the other decoders, a file that was cut off is whole.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob as globbing
import gzip
import hashlib
import io
import itertools
import json
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
from lowrank_sys.memory.limits import available_bytes

STDLIB = "python-stdlib"
# name:SPLIT or name:CONFIG:SPLIT, where SPLIT may be a slice, train[:1%]
_DATA_SET = re.compile(r"[^:*?\[\]]+(:[\w.-]+)?:\w+(\[[\d:%]+\])?")

# How files begin.
_PACKED = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".xz": rb"\xfd7zXZ\0", ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"}
_TABLES = {".parquet": rb"PAR1[\0-\x1f]", ".arrow": rb"ARROW1\0\0|\xff{4}..\0\0\x10\0\0\0"}
_FOREIGN = {"a zip archive": rb"PK\x03\x04", "a PDF": rb"%PDF-"}
_MARKS = {"utf-32": rb"\xff\xfe\0\0|\0\0\xfe\xff", "utf-16": rb"\xff\xfe|\xfe\xff"}  # in this order: they share a beginning
_LINES, _DELIMITED = (".jsonl", ".ndjson"), (".csv", ".tsv")

# Of bytes that are no UTF-8: western texts of one byte a letter have a few per cent, compressed data about half.
_INVALID_SHARE = 0.1
_HEAD = 1 << 16
_BATCH_ROWS = 1000
IN_MEMORY = 64 << 20  # bytes; what is larger stays on the disk


def read(source: str, field: str = "text") -> Iterator[bytes | mmap.mmap]:
    """The documents of `source`, one after the other, as UTF-8 (text files without a mark of UTF-16: as they are).

    A text file larger than IN_MEMORY is mapped. No document holds byte 0: rows with one are passed over.

    Raises CommandError for what is missing, damaged or no text. In a folder, files that are no text are passed over.
    """
    passed = 0
    for text in _rows_of_data_set(source, field) if _is_data_set(source) else _read(source, field):
        if text.find(b"\0") < 0:
            yield text
        else:
            passed += 1
    if passed:
        say(f"data: {passed:,} rows of {source} hold NUL bytes and were passed over")


def _read(source: str, field: str) -> Iterator[bytes | mmap.mmap]:
    whole = source == STDLIB or Path(source).is_dir()
    passed = 0
    for path in _files(source):
        try:
            yield from _read_file(path, field, named=not whole)
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
    name = source
    if _is_data_set(source):
        name = _parts(source)[0]
        if not os.path.isdir(name):
            return _builder(source).cache_dir
    digest = hashlib.sha256(os.fsencode(source))
    for path in _files(name):
        found = path.stat()
        digest.update(os.fsencode(path.resolve()) + f"\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0".encode())
    return digest.hexdigest()


class _NoText(Exception):
    """Says what was found instead."""


def _is_data_set(source: str) -> bool:
    return source != STDLIB and not os.path.exists(source) and _DATA_SET.fullmatch(source) is not None


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


def _read_file(path: Path, field: str, named: bool) -> Iterator[bytes]:
    """named: the user asked for this very file, so a .json is read as rows whatever it looks like."""
    with _opened(path) as file:
        head = file.peek(_HEAD)
        suffix = (Path(path.stem).suffix if path.suffix in _PACKED else path.suffix).lower()
        suffix = _begins(head, _TABLES) or suffix
        if suffix in _TABLES:
            yield from _rows_of_table(file, path, suffix[1:], field)
            return
        if encoding := _begins(head, _MARKS):
            try:
                content = file.read().decode(encoding).encode()
            except ValueError as error:
                raise _NoText(f"it begins as {encoding}, and is none: {error}") from error
            file, head = io.BytesIO(content), content[:_HEAD]
        _check(head)
        if suffix in _LINES:
            yield from _rows_of_lines(file, path, field)
        elif suffix in _DELIMITED:
            yield from _rows_of_delimited(file, path, field)
        elif suffix == ".json" and (named or re.match(rb"\s*\[\s*\{|\s*\{.*\}\s*\n\s*\{", head)):
            yield from _rows_of_json(file, path, field)
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
    if packed == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[packed](raw, "rb")


def _whole(file: BinaryIO) -> bytes | mmap.mmap:
    """All of the file, of which nothing was read; mapped where it is large, from a copy where it is packed."""
    content = file.read(IN_MEMORY + 1)
    if len(content) <= IN_MEMORY:
        return content
    if _is_plain(file):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with tempfile.TemporaryFile() as copy:
        copy.write(content)
        shutil.copyfileobj(file, copy)
        copy.flush()
        return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)


def _is_plain(file: BinaryIO) -> bool:
    return isinstance(getattr(file, "raw", None), io.FileIO)


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


def _rows_of_lines(file: BinaryIO, path: Path, field: str) -> Iterator[bytes]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"line {number}"
            yield _of_row(_parsed(line, f"{path}: {where}"), field, path, where)


def _rows_of_json(file: BinaryIO, path: Path, field: str) -> Iterator[bytes]:
    """An array of objects, one object, or lines of them under the wrong ending."""
    content = file.read()
    first, _, rest = content.strip().partition(b"\n")
    if first.startswith(b"{") and first.rstrip().endswith(b"}") and rest:
        yield from _rows_of_lines(io.BytesIO(content), path, field)
        return
    rows = _parsed(content, str(path))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _of_row(row, field, path, f"item {number}")


def _parsed(content: bytes, where: str):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--data {where} is not JSON: {error}") from error


def _of_row(row, field: str, path: Path, where: str) -> bytes:
    if not isinstance(row, dict):
        raise CommandError(f"--data {path}: {where} is a {type(row).__name__}, not an object")
    return _text(row.get(field), field, list(row), f"{path}: {where}")


def _rows_of_delimited(file: BinaryIO, path: Path, field: str) -> Iterator[bytes]:
    """Rows under a header; the delimiter is the one with which the header names the field."""
    csv.field_size_limit((1 << 31) - 1)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        header = lines.readline()
        delimiter = next((d for d in ",\t;|" if field in next(csv.reader([header], delimiter=d), [])), ",")
        rows = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        if header and field not in rows.fieldnames:
            _text(None, field, rows.fieldnames, f"{path}: line 1")
        for row in rows:
            yield _text(row.get(field), field, rows.fieldnames, f"{path}: line {rows.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise CommandError(f"--data {path}: it is no table of UTF-8 text: {error}") from error


def _rows_of_table(file: BinaryIO, path: Path, kind: str, field: str) -> Iterator[bytes]:
    datasets = _datasets()
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as scratch:
        options, plain = {}, path
        if not _is_plain(file):
            plain = Path(scratch, "rows")
            with plain.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        try:
            if kind == "parquet":  # one column is read alone, and the others may be of types that datasets does not know
                schema = pyarrow.parquet.read_schema(plain)
                if field not in schema.names:
                    _text(None, field, schema.names, str(path))
                features = datasets.Features.from_arrow_schema(pyarrow.schema([schema.field(field)]))
                options = dict(columns=[field], features=features, batch_size=_BATCH_ROWS)
            found = {"train": globbing.escape(str(plain.absolute()))}
            rows = datasets.load_dataset(kind, data_files=found, split="train", streaming=True, cache_dir=scratch, **options)
            yield from _texts(rows, field, str(path))
        except (pyarrow.ArrowException, UnicodeDecodeError, ValueError, TypeError) as error:
            raise CommandError(f"--data {path}: it is not {kind.title()}: {error}") from error


def _rows_of_data_set(source: str, field: str) -> Iterator[bytes]:
    """Streamed where the data set is a folder here, or larger than the memory; else as `datasets` keeps it for every program."""
    name, _, split = _parts(source)
    local, whole = os.path.isdir(name), split.partition("[")[0]
    with tempfile.TemporaryDirectory() as scratch:
        # what datasets keeps of a folder with a README is not made anew when its files change
        builder = _builder(source, cache_dir=scratch if local else None)
        sizes = {part: about.num_examples for part, about in (builder.info.splits or {}).items()}
        try:
            if (builder.info.dataset_size or 0) > available_bytes() and whole in sizes:
                [part] = _datasets().ReadInstruction.from_spec(split).to_absolute(sizes)
                start, stop = part.from_ or 0, sizes[whole] if part.to is None else part.to
                rows = builder.as_streaming_dataset(whole).skip(start).take(stop - start)
            elif local and split == whole:
                rows = builder.as_streaming_dataset(split)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split)
            yield from _texts(rows, field, source)
        except CommandError:
            raise
        except Exception as error:  # the library raises a dozen types for a wrong split, no network, a damaged file
            raise CommandError(f"--data {source}: datasets cannot load it: {error}") from error


def _parts(source: str) -> tuple[str, list[str], str]:
    """Name, configuration if any, split."""
    name, *config, split = re.split(r":(?![^\[]*\])", source)
    return name, config, split


def _builder(source: str, **options):
    name, config, _ = _parts(source)
    try:
        return _datasets().load_dataset_builder(name, *config, **options)
    except Exception as error:  # no such name, no network, and more
        raise CommandError(f"--data {source}: datasets cannot load it: {error}") from error


def _datasets():
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error as well
    return datasets


def _texts(rows, field: str, where: str) -> Iterator[bytes]:
    names = rows.column_names or list(next(iter(rows), [field]))  # a stream may know its columns by its rows alone
    if field not in names:
        _text(None, field, names, where)
    number = 0
    for batch in rows.select_columns([field]).iter(batch_size=_BATCH_ROWS):
        for number, value in enumerate(batch[field], number + 1):
            yield _text(value, field, names, f"{where}: row {number}")


def _text(value, field: str, columns: list[str], where: str) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    listed = ", ".join(map(str, columns))
    listed = listed if len(listed) <= 300 else f"{listed[:300]}…"
    raise CommandError(f"--data {where}: no text in the field {field!r}; fields: {listed} (see --text-field)")
