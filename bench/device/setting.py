"""What a phase is given, and how it writes: a row at a time, so that one that dies leaves what it had."""

import json
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank_sys.bench.report import to_json


class Skipped(Exception):
    """A phase, or a part of one, that cannot be done here, and why: no failure."""


class Failed(Exception):
    """What a phase found wrong, after all of it was written."""


class Setting(NamedTuple):
    """out: the folder. seconds: for this phase. ops: names of OPS. dry: on the CPU, at toy sizes. start: of time.monotonic()."""

    out: Path
    phase: str
    seconds: float
    ops: tuple
    dry: bool
    start: float

    @property
    def device(self):
        return "cpu" if self.dry else "cuda"

    @property
    def left(self):
        """Seconds that are left."""
        return self.start + self.seconds - time.monotonic()

    @property
    def rows(self):
        return self.out / f"{self.phase}.jsonl"

    def write(self, **row):
        """Append a row; it is on its way to the disk when this returns."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(to_json([row]).strip("[]\n") + "\n")

    def each(self, parts, reserve=0.0):
        """Every part {name: function() -> rows} that no earlier process of this phase began: their rows are written as they come.

        What raises is written as a row "failed", and the rest goes on; a GPU that is broken by it ends the process, and the
        next one goes on behind it. No part begins with less than `reserve` seconds left. Raises Failed at the end.
        """
        begun = {row["begin"] for row in read(self.rows) if "begin" in row}
        for name, part in parts.items():
            if name in begun:
                continue
            if self.left < reserve:
                self.write(left_out=[other for other in parts if other not in begun], why="the time was over")
                break
            begun.add(name)
            self.write(begin=name)
            try:
                for row in part():
                    self.write(part=name, **row)
            except Skipped as why:
                self.write(part=name, skipped=str(why))
            except Exception as error:
                self.write(part=name, failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-4000:])
                if not self.dry:
                    torch.cuda.synchronize()
        if wrong := failures(read(self.rows)):
            raise Failed(f"{len(wrong)} of {len(begun)} failed: {', '.join(wrong)}")
        print(f"{len(begun)} of {len(parts)} done")


def read(path):
    """The rows of a file; one that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return rows


def failures(rows):
    """Names of the parts that failed, or were begun and never ended: their process died."""
    ended = {row["part"] for row in rows if "part" in row}
    failed = [row["part"] for row in rows if "failed" in row or row.get("check") not in (None, "ok")]
    return list(dict.fromkeys(failed + [row["begin"] for row in rows if "begin" in row and row["begin"] not in ended]))
