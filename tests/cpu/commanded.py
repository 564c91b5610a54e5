"""`lowrank train` from its words to its files."""

import json
import sysconfig
from pathlib import Path

# What two runs have in common that are the same.
EXACT = ("step", "loss", "val_loss", "lr", "skipped")


def modules(folder, *names):
    """The folder, with these modules of Python's library in it to train on."""
    for name in names:
        (folder / f"{name}.py").write_bytes(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_bytes())
    return folder


def words(values, *more, **changed):
    """{flag: value}, of which keywords change some, as words, and more of them."""
    values = {**values, **{f"--{name.replace('_', '-')}": str(value) for name, value in changed.items()}}
    return [*(word for pair in values.items() for word in pair), *more]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def exact(out):
    return [[row[key] for key in EXACT] for row in rows(out)]


def final(out):
    return (out / "final" / "model.safetensors").read_bytes()
