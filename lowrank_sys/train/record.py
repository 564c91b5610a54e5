"""What a run says while it trains: metrics.jsonl, one row a step, and the progress line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lowrank_sys.cli import CommandError, say, silence
from lowrank_sys.distributed import World
from lowrank_sys.train.checkpoint import write_file

SECONDS_BETWEEN_READS = 0.5
SECONDS_BETWEEN_LINES = 10.0


class Recorder(TrainerCallback):
    """Writes a row for every step and evaluates every `eval_steps`, before the first step and after the last.

    Losses stay on the device and are read together about twice a second: one synchronisation for many steps. The time
    of evaluations and checkpoints does not count in tokens_per_second. `skipped` is the optimizer's count when the row
    is written.

    evaluate: () -> validation loss, None without one. skipped: () -> elements left untouched. memory: () -> most bytes held so far,
    for the progress line. path: metrics.jsonl, appended to. world: of the processes whose losses are averaged; only one of them
    `writes`, and calls `report` with each row.
    """

    def __init__(
        self,
        path: Path,
        *,
        rows: list[dict[str, Any]],
        steps: int,
        eval_steps: int,
        tokens_per_step: int,
        evaluate: Callable[[], float | None],
        skipped: Callable[[], int],
        memory: Callable[[], int],
        world: World,
        writes: bool,
        report: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.rows = rows
        self._path = path
        self._steps = steps
        self._eval_steps = eval_steps
        self._tokens_per_step = tokens_per_step
        self._evaluate = evaluate
        self._read_skipped = skipped
        self._memory, self._report = memory, report
        self._world, self._writes = world, writes
        self._pending: list[tuple[int, float, torch.Tensor]] = []  # step, lr, loss
        self._loss = self._started = self._file = None

    def seen(self, loss: torch.Tensor) -> None:
        self._loss = loss.clone() if self._loss is None else self._loss + loss

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._writes:
            return
        write_file(self._path, lambda path: path.write_text("".join(map(_line, self.rows))))
        self._file = self._path.open("a")
        # the optimizer may or may not carry its count through a checkpoint; the rows do
        self._skipped_before = (self.rows[-1]["skipped"] if self.rows else 0) - self._read_skipped()
        self._progress = _Progress(state.global_step, self._steps)
        if not self.rows:
            row = {"step": 0, "loss": None, "val_loss": None, "lr": None, "tokens_per_second": None, "skipped": 0}
            self._append([row], evaluate=True)

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self._started = self._started or time.perf_counter()
        self._lr = float(lr_scheduler.get_last_lr()[-1])  # of the linear weights

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if self._world.size > 1:
            self._world.mean_([self._loss])
        if not self._writes:
            self._loss = None
            return
        self._pending.append((step, self._lr, self._loss))
        self._loss = None
        due = step % self._eval_steps == 0 or step == self._steps
        if due or time.perf_counter() - self._started >= SECONDS_BETWEEN_READS:
            self.flush(evaluate=due)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def flush(self, evaluate: bool = False, sync: bool = False) -> None:
        """Read the losses of the steps since the last time and write their rows. sync: wait for the disk."""
        if self._pending:
            steps, rates, losses = zip(*self._pending)
            losses = torch.stack(losses).tolist()
            speed = self._tokens_per_step * len(steps) / (time.perf_counter() - self._started)
            skipped = self._skipped_before + self._read_skipped()
            rows = [
                {"step": s, "loss": loss, "val_loss": None, "lr": lr, "tokens_per_second": speed, "skipped": skipped}
                for s, lr, loss in zip(steps, rates, losses)
            ]
            self._pending, self._started = [], None
            self._append(rows, evaluate)
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._progress.close()
            with contextlib.suppress(OSError):  # every row was flushed; what could not be is reported already
                self._file.close()
            self._file = None

    def _append(self, rows: list[dict[str, Any]], evaluate: bool) -> None:
        if evaluate:
            rows[-1]["val_loss"] = self._evaluate()
        self.rows += rows
        try:
            self._file.write("".join(map(_line, rows)))
            self._file.flush()
        except OSError as error:
            raise CommandError(f"--out {self._path.parent}: could not write {self._path.name}: {error}", code=1) from error
        for row in rows if self._report else ():
            self._report(row)
        self._progress.show(rows[-1], self._memory())


class _Progress:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, step: int, steps: int):
        self._first, self._steps = step, steps
        self._began = self._shown = time.perf_counter()
        self._val_loss = None
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def show(self, row: dict[str, Any], memory: int) -> None:
        """A row of metrics.jsonl, and the most bytes held so far."""
        self._val_loss = row["val_loss"] or self._val_loss
        parts = [f"loss {row['loss']:.3f}"] if row["loss"] is not None else []
        parts += [f"val {self._val_loss:.3f}"] if self._val_loss is not None else []
        parts += [f"{row['tokens_per_second']:,.0f} tok/s"] if row["tokens_per_second"] else []
        parts += [f"{memory / 2**30:.2f} GiB"]
        parts += [f"skipped {row['skipped']:,} elements"] if row["skipped"] else []
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(", ".join(parts), refresh=False)
                self._bar.update(row["step"] - self._bar.n)
            except OSError:  # the terminal is gone
                silence(sys.stderr)
            return
        now = time.perf_counter()
        if row["val_loss"] is not None or now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            done, left = row["step"] - self._first, self._steps - row["step"]
            parts += [f"{(now - self._began) * left / done:,.0f} s left"] if done and left else []
            say(f"step {row['step']}/{self._steps}: {', '.join(parts)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def read_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to `last_step`; what a killed run wrote after its checkpoint is left out.

    Raises ValueError when a step is missing or doubled.
    """
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # the last line of a killed run
        if row["step"] <= last_step:
            rows.append(row)
    if [row["step"] for row in rows] != list(range(last_step + 1)):
        raise ValueError(f"its rows do not run from step 0 to {last_step}")
    return rows


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(row) + "\n"
