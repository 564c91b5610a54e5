"""Documents of the rows of tables: JSON, CSV, Parquet, Arrow, and data sets of Hugging Face.

Parquet, Arrow and data sets by name are read by `datasets`, as streams where that saves a copy. JSON and CSV are read here: its
builders name no line in their errors, make dates of texts that look like them and texts of numbers, refuse rows whose fields
differ, and crash on deep nesting.
"""

from __future__ import annotations

import contextlib
import csv
import glob as globbing
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowrank_sys.cli import CommandError
from lowrank_sys.memory.limits import available_bytes

# name:SPLIT or name:CONFIG:SPLIT, where SPLIT may be a slice, train[:1%]
DATA_SET = re.compile(r"([^:*?\[\]]+)(?::([\w.-]+))?:(\w+)(\[[\d:%]+\])?")
_BATCH = 1000
# How a document begins that is no text but JSON.
MARK = b"\0chat\0"


class Text:
    """The document of a row: the text of one of its fields."""

    def __init__(self, field: str):
        self.field = field

    def columns(self, names: list[str], where: str) -> list[str]:
        """Which of the columns `names` are read. Raises CommandError where the document cannot be there."""
        if self.field not in names:
            self.document({}, names, where)
        return [self.field]

    def document(self, row: dict, names: list[str], where: str) -> bytes:
        """The document of a row, UTF-8; names: of the fields that it has, also of those that were not read. Raises CommandError."""
        value = row.get(self.field)
        if isinstance(value, str):
            return value.encode("utf-8", "replace")
        listed = ", ".join(map(str, names))
        listed = listed if len(listed) <= 300 else f"{listed[:300]}…"
        raise CommandError(f"--data {where}: no text in the field {self.field!r}; fields: {listed} (see --text-field)")


def of_lines(file: BinaryIO, path: Path, fields: Text) -> Iterator[bytes]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"line {number}"
            yield _of_row(_parsed(line, f"{path}: {where}"), fields, path, where)


def of_json(file: BinaryIO, path: Path, fields: Text) -> Iterator[bytes]:
    """An array of objects, one object, or lines of them under the wrong ending."""
    content = file.read()
    first, _, rest = content.strip().partition(b"\n")
    if first.startswith(b"{") and first.rstrip().endswith(b"}") and rest:
        yield from of_lines(io.BytesIO(content), path, fields)
        return
    rows = _parsed(content, str(path))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _of_row(row, fields, path, f"item {number}")


def _parsed(content: bytes, where: str):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--data {where} is not JSON: {error}") from error


def _of_row(row, fields: Text, path: Path, where: str) -> bytes:
    if not isinstance(row, dict):
        raise CommandError(f"--data {path}: {where} is a {type(row).__name__}, not an object")
    return fields.document(row, list(row), f"{path}: {where}")


def of_delimited(file: BinaryIO, path: Path, fields: Text) -> Iterator[bytes]:
    """Rows under a header; the delimiter is the one with which the header names the fields."""
    csv.field_size_limit((1 << 31) - 1)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        header = lines.readline()
        delimiter = next((d for d in ",\t;|" if _has(fields, next(csv.reader([header], delimiter=d), []))), ",")
        rows = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        if header:
            fields.columns(rows.fieldnames, f"{path}: line 1")
        for row in rows:
            yield fields.document(row, rows.fieldnames, f"{path}: line {rows.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise CommandError(f"--data {path}: it is no table of UTF-8 text: {error}") from error


def _has(fields: Text, names: list[str]) -> bool:
    try:
        return bool(fields.columns(names, ""))
    except CommandError:
        return False


def of_table(file: BinaryIO, path: Path, kind: str, fields: Text) -> Iterator[bytes]:
    """kind: "parquet" or "arrow"."""
    datasets = _datasets()
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as scratch:
        plain, options = Path(scratch, "rows"), {}
        if is_plain(file):
            plain.symlink_to(path.absolute())  # datasets takes some names for patterns or addresses
        else:
            with plain.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        try:
            if kind == "parquet":  # these columns alone: it is less, and the others may be of types that datasets does not know
                schema = pyarrow.parquet.read_schema(plain)
                read = fields.columns(schema.names, str(path))
                features = datasets.Features.from_arrow_schema(pyarrow.schema([schema.field(name) for name in read]))
                options = dict(columns=read, features=features, batch_size=_BATCH)
            files = {"train": globbing.escape(str(plain))}
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=scratch, **options)
            yield from _documents(rows, fields, str(path))
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            raise CommandError(f"--data {path}: it is not {kind.title()}: {str(error)[:300]}") from error


def of_data_set(source: str, fields: Text) -> Iterator[bytes]:
    """Streamed from a folder here, or where larger than the memory and not prepared yet; else what `datasets` keeps is read."""
    name, _, split, part = DATA_SET.fullmatch(source).groups("")
    local = os.path.isdir(name)
    with tempfile.TemporaryDirectory() as scratch, _told(source):
        # what datasets keeps of a folder with a README is not made anew when its files change
        builder = _builder(source, cache_dir=scratch if local else None)
        lengths = builder.info.splits or {}
        large = (builder.info.dataset_size or 0) > available_bytes() and not os.path.exists(builder.cache_dir)
        if large and split in lengths:
            count = lengths[split].num_examples
            [span] = _datasets().ReadInstruction.from_spec(split + part).to_absolute({split: count})
            start, stop = span.from_ or 0, count if span.to is None else span.to
            rows = builder.as_streaming_dataset(split).skip(start).take(stop - start)
        elif local and not part:
            rows = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split + part)
        yield from _documents(rows, fields, source)


def revision(source: str) -> str:
    """What changes with the files of a data set that is no folder here. Raises CommandError."""
    with _told(source):
        return _builder(source).cache_dir


def _builder(source: str, **options):
    name, config, *_ = DATA_SET.fullmatch(source).groups()
    return _datasets().load_dataset_builder(name, config, **options)


@contextlib.contextmanager
def _told(source: str) -> Iterator[None]:
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # the library raises a dozen types for a wrong name or split, no network, a damaged file
        raise CommandError(f"--data {source}: datasets cannot load it: {str(error)[:300]}") from error


def _datasets():
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error as well
    return datasets


def _documents(rows, fields: Text, where: str) -> Iterator[bytes]:
    names = rows.column_names or list(next(iter(rows), {}))  # a stream may know its columns by its rows alone
    if not names:
        return
    read, number = fields.columns(names, where), 0
    for batch in rows.select_columns(read).iter(batch_size=_BATCH):
        for number, values in enumerate(zip(*(batch[name] for name in read)), number + 1):
            yield fields.document(dict(zip(read, values)), names, f"{where}: row {number}")


def is_plain(file: BinaryIO) -> bool:
    """Whether it is a file on the disk as it is."""
    return isinstance(getattr(file, "raw", None), io.FileIO)
