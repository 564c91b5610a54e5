"""`lowrank train --nproc N`: N processes under torchrun's elastic agent, and what happens when one of them dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from lowrank_sys.cli import CommandError, say

# How often in a row a run is started again from one checkpoint.
RESTARTS = 3
# Exit code of bad input, which is no better the next time.
BAD_INPUT = 2


def start(nproc: int, words: Sequence[str], out: Path, resume: bool) -> None:
    """Run `lowrank train WORDS` as `nproc` processes on this machine. When one dies, all start again from the last checkpoint.

    words: without --resume. out: the folder of checkpoints. Raises CommandError with the code of what ended the run.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    failures, newest = 0, _newest(out)
    while True:
        try:
            _launch(nproc, [*words, *(["--resume"] if resume else [])])
            return
        except ChildFailedError as error:
            rank, code = min(((rank, failed.exitcode) for rank, failed in error.failures.items()), key=_blame)
        except SignalException as error:
            code = 130 if error.sigval == signal.SIGINT else 128 + error.sigval
            raise CommandError(f"interrupted; --resume goes on from the last checkpoint in {out}", code=code) from None
        if code == BAD_INPUT:
            raise SystemExit(BAD_INPUT)  # it has said why
        before, newest = newest, _newest(out)
        failures = 1 if newest != before else failures + 1
        ended = f"process {rank} {_how(code)}"
        if failures > RESTARTS or (code > 0 and newest == before):  # an error of its own would come again
            raise CommandError(f"{ended}, without a new checkpoint since it was started; --resume goes on", code=1)
        resume = True
        say(f"{ended}: all {nproc} start again from {newest or 'the beginning'} ({failures} of {RESTARTS})")


def _blame(failed: tuple[int, int]) -> tuple[bool, bool, bool, int]:
    """Whose end ended the others: the agent stops those with SIGTERM, and they fail where they wait for the one that died."""
    rank, code = failed
    return code != BAD_INPUT, code == -signal.SIGTERM, code > 0, rank


def _launch(nproc: int, words: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # the processes write to our own streams; by default a folder stays behind
    )  # fmt: skip
    elastic_launch(config, sys.executable)("-m", "lowrank_sys", "train", *words)


def _newest(out: Path) -> str | None:
    """The name of the newest checkpoint."""
    return max((path.name for path in out.glob("step-*")), default=None)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
