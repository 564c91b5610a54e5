"""The place of a process among those of a run, as torchrun tells it by variables."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from lowrank_sys.cli import CommandError

# name -> least value
VARIABLES = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": -1}
# Where the processes of a run meet.
MEETING = ("MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Process `rank` of `size`, `local_rank` of `local_size` on its machine. variables: those that said so."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> bool:
        """Whether it writes the files, and speaks."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Meet the other processes; accelerate and transformers then find the group. Nothing for one process."""
        import torch

        if self.size == 1:
            return
        os.environ.update(dict(self.variables))
        if device == "cuda":
            torch.cuda.set_device(self.local_rank)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def told(self, value: Any, error: CommandError | None) -> Any:
        """The first process's value; its CommandError, where it has one, is raised on all."""
        if self.size > 1:
            import torch

            box = [(value, error and (str(error), error.code))]
            torch.distributed.broadcast_object_list(box, src=0)
            value, raised = box[0]
            error = raised and CommandError(*raised)
        if error is not None:
            raise error
        return value


def attempt(work: Callable[[], Any]) -> tuple[Any, CommandError | None]:
    """(what `work` returns, None), or (None, its CommandError)."""
    try:
        return work(), None
    except CommandError as error:
        return None, error


def leave(environ: MutableMapping[str, str]) -> Place:
    """Take the launcher's variables out of `environ`, so that what runs before `join` runs as one process does.

    Raises CommandError for a value that is no number (an empty one counts as unset), and for several processes that cannot meet.
    """
    values = {name: environ.get(name, "").strip() for name in VARIABLES}
    for name, value in values.items():
        if value and not (value.removeprefix("-").isdecimal() and int(value) >= VARIABLES[name]):
            raise CommandError(f"{name}={environ[name]}: it must be a whole number from {VARIABLES[name]} on, empty or unset")
    size = int(values["WORLD_SIZE"] or 1)
    place = Place()
    if size > 1:
        missing = [name for name in (*VARIABLES, *MEETING) if not environ.get(name, "").strip()]
        if missing:
            raise CommandError(f"WORLD_SIZE={size}: {', '.join(missing)} must be set too, as torchrun does; or use --nproc {size}")
        numbers = [int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        place = Place(*numbers, tuple((name, environ[name]) for name in VARIABLES))
    for name in VARIABLES:
        environ.pop(name, None)
    return place
