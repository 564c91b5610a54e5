"""What a process needs without tensors: libraries, thread pools, the corpus. Measured, in a process of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_sys.cli import CommandError
from lowrank_sys.memory.rehearsal import rehearse
from lowrank_sys.memory.remembered import remembered

# A run that has everything but tensors of a size.
PROBE = {
    "model": "llama-1m", "steps": 2, "batch_size": 1, "seq_len": 16, "rank": 8, "gradient_accumulation_steps": 1,
    "eval_tokens": 16, "device": "cpu",
}  # fmt: skip
# Flags that decide what the process loads and holds.
KEPT = ("method", "data", "text_field", "tokenizer", "dtype", "subspace", "weights")

# Flags that change neither.
UNRELATED = (
    "model", "out", "run", "command", "json", "device_memory", "resume", "save_steps", "eval_steps", "keep", "seed", "lr",
    "plain_lr", "scale", "weight_decay", "warmup_ratio", "warmup_steps", "min_lr_ratio", "data", "as_given",
)  # fmt: skip
PACKAGE = Path(__file__).resolve().parents[1]

# The CUDA context, cuBLAS and loaded kernels on a GPU. Stated, not measured.
CUDA_CONTEXT = 768 << 20


class Baseline(NamedTuple):
    """Bytes of a process beside its tensors, while it trains and at the end, when plots and files are made."""

    training: int
    finishing: int
    measured: bool


def measure(args: argparse.Namespace) -> Baseline:
    """`lowrank train` for two steps of a 1M model in a fresh process, less the tensors of that run. Takes some 10 s.

    Kept in the user's cache folder for the next time, where the text is python-stdlib, a file or a folder. On a GPU there is
    nothing to measure so: CUDA_CONTEXT. Raises CommandError with the words of `lowrank train`.
    """
    if args.device == "cuda":
        return Baseline(CUDA_CONTEXT, CUDA_CONTEXT, measured=False)
    if args.from_ is not None:  # chats are for its tokenizer, which is no part of the probe
        args = argparse.Namespace(**{**vars(args), "from_": None, "tokenizer": None, "data": "python-stdlib"})
    probe = argparse.Namespace(**{**vars(args), **PROBE})
    text = _text(args.data)
    if text is None:
        return _measure(args, probe)
    return Baseline(*remembered("process", {**_surroundings(probe), "text": text}, lambda: _measure(args, probe)))


def _surroundings(probe: argparse.Namespace) -> dict[str, Any]:
    """What a measurement depends on beside the text: flags, versions, sources, and what changes threads and allocation."""
    own = {str(p.relative_to(PACKAGE)): _stamp(p) for p in sorted(PACKAGE.rglob("*")) if p.suffix in (".py", ".so")}
    flags = {k: v for k, v in vars(probe).items() if k not in UNRELATED and isinstance(v, (str, int, float, list, type(None)))}
    variables = {k: v for k, v in os.environ.items() if re.match("MALLOC_|OMP_|MKL_|LOWRANK_|LD_PRELOAD|GLIBC_|TORCH", k)}
    versions = sorted(f"{d.metadata['Name']} {d.version}" for d in metadata.distributions())
    machine = [platform.platform(), platform.processor(), os.cpu_count(), len(os.sched_getaffinity(0)), sys.version]
    kept = {"sources": own, "versions": versions, "machine": machine, "interpreter": sys.executable}
    return {"flags": flags, "variables": variables, "digest": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}


def _text(data: str) -> Any:
    """What tells a text from what it was before; None where that would mean to read it."""
    path = Path(data)
    if data == "python-stdlib":
        return data
    if path.is_file():
        return [str(path.resolve()), _stamp(path)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[str(p.resolve()), _stamp(p)] for p in files]
    return None


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _measure(args: argparse.Namespace, probe: argparse.Namespace) -> Baseline:
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
