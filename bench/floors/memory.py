"""The promise of memory: real steps of LLaMA-7B, in the better part of an hour each. They run only on demand."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lowrank_sys.bench.floors.floor import Floor
from lowrank_sys.bench.plan import LOWRANK
from lowrank_sys.cli import CommandError

MODEL = (
    "--model",
    "llama-7b",
    "--batch-size",
    "1",
    "--seq-len",
    "256",
    "--dtype",
    "bf16",
    "--gradient-checkpointing",
    "--eval-tokens",
    "256",
    "--eval-steps",
    "2",
    "--warmup-steps",
    "0",
    "--lr",
    "0.001",
    "--plain-lr",
    "0.001",
    "--device",
    "cpu",
)
METHOD = ("--method", "q-galore", "--rank", "1024", "--proj-type", "short-moments")
IN_BACKWARD = ("--per-layer", "in_backward", "--steps", "2")
FOUR_BATCHES = ("--per-layer", "accumulate", "--accumulate-dtype", "bf16", "--gradient-accumulation-steps", "4", "--steps", "1")


def peak(*flags):
    """A measurement: peak memory of a process that trains with these flags and writes its model, in GiB."""

    def measure(timer):
        with tempfile.TemporaryDirectory() as folder:
            command = ["train", *flags, "--out", str(Path(folder) / "run")]
            done = subprocess.run([sys.executable, "-c", LOWRANK, *command], stdout=subprocess.DEVNULL)
            if done.returncode:
                raise CommandError(f"lowrank {' '.join(command)} ended with code {done.returncode}", code=1)
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        return summary["peak_memory_bytes"] / 2**30

    return measure


FLOORS = [
    Floor(
        "LLaMA-7B, Q-GaLore r = 1024, a step in every backward: peak memory of the process",
        "<= 12 GiB",
        12.0,
        peak(*MODEL, *METHOD, *IN_BACKWARD),
        False,
        "{:.2f} GiB",
        long=True,
        speed=False,
    ),
    Floor(
        "LLaMA-7B, Q-GaLore r = 1024, four micro-batches: peak memory of the process",
        "<= 16 GiB",
        16.0,
        peak(*MODEL, *METHOD, *FOUR_BATCHES),
        False,
        "{:.2f} GiB",
        long=True,
        speed=False,
    ),
]
