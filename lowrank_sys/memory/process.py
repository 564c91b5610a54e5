"""What a process needs without tensors: libraries, thread pools, the corpus. Measured, in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lowrank_sys.cli import CommandError
from lowrank_sys.memory.rehearsal import rehearse

# A run that has everything but tensors of a size.
PROBE = {
    "model": "llama-1m", "steps": 2, "batch_size": 1, "seq_len": 16, "rank": 8, "gradient_accumulation_steps": 1,
    "eval_tokens": 16, "device": "cpu",
}  # fmt: skip
# Flags that decide what the process loads and holds.
KEPT = ("method", "data", "text_field", "tokenizer", "dtype", "subspace", "weights")

# The CUDA context, cuBLAS and loaded kernels on a GPU. Stated, not measured.
CUDA_CONTEXT = 768 << 20


class Baseline(NamedTuple):
    """Bytes of a process beside its tensors, while it trains and at the end, when plots and files are made."""

    training: int
    finishing: int
    measured: bool


def measure(args: argparse.Namespace) -> Baseline:
    """`lowrank train` for two steps of a 1M model in a fresh process, less the tensors of that run. Takes some 10 s.

    On a GPU there is nothing to measure so: CUDA_CONTEXT. Raises CommandError with the words of `lowrank train`.
    """
    if args.device == "cuda":
        return Baseline(CUDA_CONTEXT, CUDA_CONTEXT, measured=False)
    probe = argparse.Namespace(**{**vars(args), **PROBE})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = {**PROBE, **{name: getattr(args, name) for name in KEPT if getattr(args, name) is not None}, "out": out}
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        code = "import sys; from lowrank_sys import cli; sys.exit(cli.main(['train', *sys.argv[1:]]))"
        words.append("--as-given")  # what it may take by itself is no part of what the process needs
        done = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            tensors = rehearse(probe)
            _, said = done.communicate()
        finally:
            done.kill()
            done.wait()
        if done.returncode:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise CommandError(last.removeprefix("lowrank train: error: "), code=done.returncode)
        summary = json.loads((out / "summary.json").read_text())
    return Baseline(summary["training_peak_memory_bytes"] - tensors.peak, summary["peak_memory_bytes"] - tensors.rest, True)
