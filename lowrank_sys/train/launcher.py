"""Variables by which launchers such as torchrun tell a process its place among many."""

from __future__ import annotations

from collections.abc import MutableMapping

from lowrank_sys.cli import CommandError

# name -> least value
VARIABLES = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": -1}


def leave(environ: MutableMapping[str, str]) -> None:
    """Take the launcher's variables out of `environ`: accelerate would wait for a process group, and a run has none.

    Raises CommandError for more than one process, or a value that is no number; an empty one counts as unset.
    """
    for name, least in VARIABLES.items():
        value = environ.get(name, "").strip()
        if value and not (value.removeprefix("-").isdecimal() and int(value) >= least):
            raise CommandError(f"{name}={value}: it must be a whole number from {least} on, empty or unset")
    if int(environ.get("WORLD_SIZE", "").strip() or 1) > 1:
        raise CommandError(f"WORLD_SIZE={environ['WORLD_SIZE']}: lowrank train runs as one process on one device")
    for name in VARIABLES:
        environ.pop(name, None)
