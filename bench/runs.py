"""Short runs of `lowrank train` in this process, a line of a file each: what is in the file is not run again."""

import contextlib
import fcntl
import io
import json
import math
import shlex
import tempfile
import time
from pathlib import Path

from lowrank_sys import cli
from lowrank_sys.cli import CommandError


class OutOfTime(Exception):
    """The runs of a file have had their hours."""


class Runs:
    """The runs of one file of JSON lines, held by this process; as a function: (flags of lowrank train) -> the row of that run.

    A row is keyed by its command, --out apart. It has `val_loss`, None where it is not finite, `optimizer_state_bytes`, `seconds`,
    and `machine`; of a combination that is refused (exit code 2) only `refused`, the words. The half of a line that a killed
    process leaves is dropped.

    path: of the file, which is made. hours: the sum of `seconds` of all rows at which no further run begins. tell: called with
    a line for each run.
    """

    def __init__(self, path, hours, tell):
        self._hours, self._tell = hours, tell
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")
        except OSError as error:
            raise CommandError(f"--out {path}: cannot write it: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandError(f"--out {path}: another process is writing there") from None
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        self._file.truncate(len(whole.encode()))
        try:
            self.rows = {row["command"]: row for row in map(json.loads, whole.splitlines())}
        except (ValueError, TypeError, KeyError):
            raise CommandError(f"--out {path}: it is no file of such runs") from None

    def __call__(self, words):
        command = shlex.join(["lowrank", "train", *words])
        if command not in self.rows:
            if self.seconds() >= 3600 * self._hours:
                raise OutOfTime
            self._tell(command)
            self.keep({"command": command, **_train(words)})
        return self.rows[command]

    def seconds(self):
        return sum(row["seconds"] for row in self.rows.values())

    def keep(self, row):
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows[row["command"]] = row


def _train(words):
    began, said = time.perf_counter(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(["train", *words, "--out", str(out)])
        seconds = round(time.perf_counter() - began, 2)
        last = said.getvalue().strip().rpartition("\n")[2]
        if code == 2:
            return {"refused": last, "seconds": seconds}
        if code:
            raise CommandError(f"{shlex.join(['lowrank', 'train', *words])} ended with code {code}: {last}", code=code)
        summary = json.loads((out / "summary.json").read_text())
    loss = summary["val_loss"]
    return {
        "val_loss": loss if math.isfinite(loss) else None,
        "optimizer_state_bytes": summary["optimizer_state_bytes"],
        "seconds": seconds,
        "machine": summary["machine"],
    }
