"""What a run leaves behind: summary.json, loss.png and the closing table."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lowrank_sys.nn.quant_weight import is_quantized, low_rank_part, rows_here
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.train.checkpoint import write_file

# 8-byte words that are summed at once, and what sets the pieces apart.
PIECE, ODD = 1 << 17, 0x9E3779B97F4A7C15 - 2**64

TABLE = [
    ("validation loss", "val_loss", "{:.4f} nats/token"),
    ("train loss", "train_loss", "{:.4f} nats/token"),
    ("unigram entropy", "unigram_entropy", "{:.4f} nats/token"),
    ("processes", "processes", "{}"),
    ("speed", "tokens_per_second", "{:,.0f} tokens/s"),
    ("optimizer state", "optimizer_state_bytes", "{:,} bytes"),
    ("AdamW's would be", "adamw_state_bytes", "{:,} bytes"),
    ("peak memory", "peak_memory_bytes", "{:,} bytes"),
    ("matrices trained", "matrices_changed", "{0[0]} of {0[1]}"),
    ("skipped elements", "skipped", "{:,}"),
]


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    write_file(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))


def fingerprints(optimizer: torch.optim.Optimizer) -> list[int]:
    """64 bits of the bytes of every matrix that trains in a subspace: equal ones say that it never changed.

    Summed where the weights are: one number a matrix comes to the host.
    """
    params = (p for group in optimizer.param_groups if "rank" in group for p in weights(group))
    sums = [sum(map(_sum_of_bytes, _moving(p))) for p in params]
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def _moving(param):
    """What training writes of a weight."""
    if not is_quantized(param):
        return [param.detach()]
    codes, part = rows_here(param).codes, low_rank_part(param)
    return [codes] if part is None else [codes, part.factor]


def _sum_of_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim int64: the 8-byte words of `tensor` times odd numbers of their place in a piece, and of the piece, modulo 2^64."""
    stored = tensor.contiguous().view(-1).view(torch.uint8)
    whole = stored.numel() // 8 * 8
    words = [*stored[:whole].view(torch.int64).split(PIECE), stored[whole:].to(torch.int64)]
    places = 2 * torch.arange(min(PIECE, max(map(len, words))), device=tensor.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in words:
        total = ODD * total + (piece * places[: len(piece)]).sum()
    return total


def table(summary: dict[str, Any]) -> str:
    """The main numbers of a summary, one a line."""
    title = f"{summary['model']}, {summary['method']}, {summary['steps']} steps, {summary['tokens']:,} tokens"
    lines = [f"  {name:<18}{form.format(summary[key])}" for name, key, form in TABLE if summary[key] not in (None, [])]
    return "\n".join([title, *lines])


def speed(rows: list[dict[str, Any]]) -> float | None:
    """Tokens a second over all steps: every row stands for the same number of tokens, so it is the harmonic mean."""
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    return len(speeds) / sum(1 / s for s in speeds) if speeds else None


def plot(path: Path, rows: list[dict[str, Any]], unigram_entropy: float, title: str) -> None:
    """Draw training and validation loss over the steps, with the unigram entropy as the yardstick."""
    # Figure, not pyplot: no display, no global state, and half the import time
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    valid = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), color="tab:blue", linewidth=0.8, alpha=0.8, label="training batch")
    if valid:
        axes.plot(*zip(*valid), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=0.8, label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # names are drawn as they are: what stands between two dollar signs is no formula
    axes.set_title(_shown(title), parse_math=False, usetex=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are drawn as boxes
        write_file(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def _shown(name: str, length: int = 90) -> str:
    """`name` on one line that fits a picture; bytes of a file name that are no UTF-8 as escapes."""
    line = " ".join(name.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= length else f"{line[: length // 2]}…{line[-(length // 2) :]}"


def machine(device: torch.device) -> str:
    """One line that a number needs beside it: processor, memory, threads, versions."""
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    host = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name} {card.total_memory / 2**30:.0f} GiB, {host}, {versions}"
    return f"{host}, {versions}"


def surroundings(processes: int) -> dict[str, Any]:
    """What a run must find again to go on to the bit, beside its flags."""
    return {"processes": processes, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the process (resident set) on a CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # ru_maxrss would count the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
