"""Tables and plots for people; JSON and CSV for programs; files are written whole or not at all."""

import csv
import errno
import io
import json
import math
import os
from pathlib import Path

from lowrank_sys.bench import plot
from lowrank_sys.cli import CommandError


def add_output_arguments(parser, *, compare=False, plot=None):
    parser.add_argument("--json", metavar="FILE", help="write one object a row: figures, machine, versions, commit, command")
    parser.add_argument("--csv", metavar="FILE", help="write the same as comma-separated values")
    if plot:
        parser.add_argument("--plot", metavar="FILE", help=f"draw {plot}")
    if compare:
        parser.add_argument(
            "--compare",
            metavar="OLD",
            help="a file of --json from this machine: print new over old times, "
            "and exit 1 if one is slower by more than the two spreads",
        )


def seconds(value):
    """1.23e-3 -> '1.230 ms'."""
    if value is None:
        return ""
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{value / size:.4g} {unit}"


def number(value, form="{:.1f}"):
    return "" if value is None else form.format(value)


def size(value):
    """1.5 MiB and the like."""
    for unit, bytes in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= bytes:
            return f"{value / bytes:.1f} {unit}"
    return f"{value} B"


class Report:
    """Collects rows, prints them as they come, and writes the files at the end.

    facts: fields that every row of the files carries (machine, versions, commit).
    """

    def __init__(self, args, facts):
        try:
            from rich.console import Console
        except ImportError:
            raise CommandError("rich is not installed: pip install rich") from None
        self.console = Console(highlight=False, soft_wrap=True)
        self.console.width = max(self.console.width, 200)  # a figure is never cut short
        self.facts = facts
        self.rows = []
        self.writers = [(Path(path), form) for path, form in ((args.json, to_json), (args.csv, to_csv)) if path]
        self.picture = Path(args.plot) if getattr(args, "plot", None) else None
        # an output that cannot be written is told before the work, not after
        if self.picture:
            plot.check(self.picture)
        for path in [*(path for path, _ in self.writers), *([self.picture] if self.picture else [])]:
            _temporary(path).unlink()

    def say(self, text):
        self.console.print(text, markup=False)

    def table(self, title, columns, rows):
        """Print a titled table and keep its rows. columns: [(heading, row -> text)]."""
        self.show(title, columns, rows)
        self.rows += rows

    def show(self, title, columns, rows):
        """Print a titled table."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(text(row) for _, text in columns))
        self.console.print(table)
        self.console.print()

    def write(self, draw=None):
        """Write the files. draw: (rows, facts) -> the figure of --plot."""
        rows = [{**row, **self.facts} for row in self.rows]
        writers = [(path, form(rows).encode()) for path, form in self.writers]
        if self.picture:
            writers.append((self.picture, plot.encoded(draw(self.rows, self.facts), self.picture)))
        for path, content in writers:
            temporary = _temporary(path)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise CommandError(f"{path}: cannot write it: {error.strerror}", code=1) from None


def to_json(rows):
    """A JSON array with a row a line; a figure that is not finite is null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "[\n" + ",\n".join(json.dumps(plain(row)) for row in rows) + "\n]\n"


def to_csv(rows):
    """Comma-separated values; nested fields are joined by a dot."""
    flat = [dict(_flatten(row)) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flatten(row, prefix=""):
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _temporary(path):
    """An empty file beside `path`, to be renamed to it."""
    temporary = path.parent / f".{path.name}.partial"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        temporary.touch()
    except OSError as error:
        raise CommandError(f"{path}: cannot write it: {error.strerror}") from None
    return temporary
