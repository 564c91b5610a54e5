"""`--compare OLD.json`: a run beside an earlier one on the same machine."""

import json
from pathlib import Path

from lowrank_sys.bench import report, timing
from lowrank_sys.cli import CommandError

# Times of another machine say nothing about a change of the code.
MACHINE = ("device", "cores", "threads")
FIGURES = ("median_s", "spread")


def read(path, keys, facts):
    """{identity: row} of a file that --json wrote on this machine; None without a path.

    keys: the fields that identify a row. facts: of this machine.
    """
    if path is None:
        return None
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--compare {path}: cannot read it: {error.strerror}") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise CommandError(f"--compare {path}: it is not JSON: {error}") from None
    wanted = {*keys, *FIGURES, *MACHINE}
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) and wanted <= row.keys() for row in rows)):
        raise CommandError(f"--compare {path}: it does not hold rows of this command; each needs {', '.join(sorted(wanted))}")
    for name in MACHINE:
        if rows[0][name] != facts[name]:
            raise CommandError(f"--compare {path}: the machines differ: {name} was {rows[0][name]}, is {facts[name]} here")
    return {_identity(row, keys): row for row in rows}


def _identity(row, keys):
    return tuple(row[key] for key in keys)


def verdict(new, old):
    """'regression', 'faster', or 'noise' where the medians differ by no more than the two spreads together."""
    if timing.factor(new["median_s"], old["median_s"]) <= (1 + new["spread"]) * (1 + old["spread"]):
        return "noise"
    return "regression" if new["median_s"] > old["median_s"] else "faster"


def refuse(slower, path):
    if slower:
        raise CommandError(f"{slower} rows are slower than in {path}, beyond the spreads", code=1)


def judge(out, old, keys, path):
    """Print the rows of `out` that `old` has too, and give each `old_s`, `new_over_old` and `verdict`; how many regressed."""
    # the oracle's speed is no promise
    rows = [row for row in out.rows if row.get("variant") != "reference" and row["spread"] is not None]
    pairs = [(row, old[_identity(row, keys)]) for row in rows if _identity(row, keys) in old]
    pairs = [(new, before) for new, before in pairs if before["spread"] is not None]
    if not pairs:
        raise CommandError(f"--compare {path}: it has no row in common with this run that has a spread in both")
    for new, before in pairs:
        new |= {"old_s": before["median_s"], "new_over_old": new["median_s"] / before["median_s"],
                "verdict": verdict(new, before)}
    columns = [*((key, lambda row, key=key: "" if row[key] is None else str(row[key])) for key in keys),
               ("old", lambda row: report.seconds(row["old_s"])), ("new", lambda row: report.seconds(row["median_s"])),
               ("new / old", lambda row: f"{row['new_over_old']:.3g}"), ("", lambda row: row["verdict"])]
    found = [new for new, _ in pairs]
    out.show(f"against {path}", columns, found)
    alone = len(rows) - len(pairs)
    if alone:
        out.say(f"{alone} of {len(rows)} rows have no partner in {path}")
    return sum(row["verdict"] == "regression" for row in found)
