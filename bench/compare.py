"""`--compare OLD.json`: a run beside an earlier one on the same machine."""

import json
from pathlib import Path

from lowrank_sys.bench import report, timing
from lowrank_sys.cli import CommandError

# Times of another machine say nothing about a change of the code.
MACHINE = ("device", "cores", "threads")
FIGURES = ("median_s", "spread")
# Rows of others' code that it takes to tell what the machine does from what one row does.
OTHERS = 8


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


def verdict(change, new, old):
    """'regression', 'faster', or 'noise': whether a change is within the two spreads together.

    One that the base of the case, timed in the same rounds, made too is the machine's.
    """
    if new.get("ratio") and old.get("ratio"):
        change = min(change, new["ratio"] / old["ratio"], key=lambda value: timing.factor(value, 1))
    if timing.factor(change, 1) <= (1 + new["spread"]) * (1 + old["spread"]):
        return "noise"
    return "regression" if change > 1 else "faster"


def refuse(slower, path):
    if slower:
        raise CommandError(f"rows slower than in {path}, beyond the spreads: {slower}", code=1)


def judge(out, old, keys, path, ours):
    """Print the rows of `out` that `old` has too, and give each `old_s`, `new_over_old` and `verdict`; how many regressed.

    ours: row -> whether this project's code was timed. The median change of the other rows is the machine's, between the two
    runs: verdicts allow for it.
    """
    # the oracle's speed is no promise
    rows = [row for row in out.rows if row.get("variant") != "reference" and row["spread"] is not None]
    pairs = [(row, old[_identity(row, keys)]) for row in rows if _identity(row, keys) in old]
    pairs = [(new, before) for new, before in pairs if before["spread"] is not None]
    if not pairs:
        raise CommandError(f"--compare {path}: it has no row in common with this run that has a spread in both")
    for new, before in pairs:
        new |= {"old_s": before["median_s"], "new_over_old": new["median_s"] / before["median_s"]}
    others = [new["new_over_old"] for new, _ in pairs if not ours(new)]
    drift = timing.quantile(others, 0.5) if len(others) >= OTHERS else 1.0
    for new, before in pairs:
        new["verdict"] = verdict(new["new_over_old"] / drift, new, before)
    columns = [
        *((key, lambda row, key=key: "" if row[key] is None else str(row[key])) for key in keys),
        ("old", lambda row: report.seconds(row["old_s"])),
        ("new", lambda row: report.seconds(row["median_s"])),
        ("new / old", lambda row: f"{row['new_over_old']:.3g}"),
        ("", lambda row: row["verdict"]),
    ]
    found = [new for new, _ in pairs]
    out.show(f"against {path}", columns, found)
    if drift != 1:
        out.say(
            f"the machine: {len(others)} rows of others' code took {drift:.3g} times as long as in {path}; verdicts allow for it"
        )
    alone = len(rows) - len(pairs)
    if alone:
        out.say(f"{alone} of {len(rows)} rows have no partner in {path}")
    return sum(row["verdict"] == "regression" for row in found if ours(row))
