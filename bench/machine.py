"""What a measurement was taken on: names, versions, commit, and the machine's own ceilings, measured."""

import functools
import importlib
import os
import platform
import subprocess
from pathlib import Path

import torch

import lowrank_sys
from lowrank_sys.info import cpu_name


def describe(device):
    """Fields of the machine line; `device` is the GPU's name or the CPU's."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "device_type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "lowrank_sys": lowrank_sys.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def absent(module, package):
    """'' if a module can be imported, else how to install it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} is not installed ({error}): pip install {package}"
    return ""


def line(machine):
    """The machine in one line."""
    where = machine["device"]
    if machine["device_type"] == "cpu":
        where += f", {machine['cores']} cores, {machine['threads']} threads, load {os.getloadavg()[0]:.1f}"
    versions = f"torch {machine['torch']} | lowrank-sys {machine['lowrank_sys']}"
    return f"{where} | {versions}" + (f" ({machine['commit']})" if machine["commit"] else "")


def commit():
    """Short hash of the checkout this file is tracked in, with a + if it has changes; None outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments):
        return subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# What the ceilings are measured with: a copy of so many bytes, and a square product of this size; and so on a GPU.
COPIED, SQUARE = 256 << 20, 2048
GPU_COPIED, GPU_SQUARE = 1 << 30, 8192


def yardsticks(device, dtypes):
    """{"copy" or a dtype: (function to time, GB that it moves (read + write) or GFLOP of its product)}.

    The data is random: bits that never change take less power, and a GPU then runs faster. On a GPU also "tf32".
    """
    gpu = torch.device(device).type == "cuda"
    copied, square = (GPU_COPIED, GPU_SQUARE) if gpu else (COPIED, SQUARE)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": (lambda: target.copy_(source), 2 * copied / 1e9)}
    for name in [*dtypes, *(["tf32"] if gpu else [])]:
        dtype = torch.float32 if name == "tf32" else name
        a, b = (torch.randn(square, square, device=device).to(dtype) for _ in range(2))
        multiply = functools.partial(_in_tf32 if name == "tf32" else torch.mm, a, b, out=torch.empty_like(a))
        found[name] = multiply, 2 * square**3 / 1e9
    return found


def _in_tf32(a, b, out):
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        torch.mm(a, b, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def ceilings(timer, dtypes):
    """Best measured copy bandwidth (read + write, GB/s) and GEMM rate per dtype (GFLOP/s) of the timer's device.

    On a GPU "tf32" is among the dtypes: fp32 operands, and products of their leading 11 bits.
    """
    sticks = yardsticks(timer.device, dtypes)
    times = timer.interleave({name: function for name, (function, _) in sticks.items()}, seconds=1, at_least=5, at_most=20)
    best = {name: work / min(times[name]) for name, (_, work) in sticks.items()}
    return {
        "copy_gb_per_s": best.pop("copy"),
        "gemm_gflop_per_s": {str(dtype).removeprefix("torch."): rate for dtype, rate in best.items()},
    }


def higher(ceilings, others):
    """The higher of two measurements of each ceiling."""
    rates = ceilings["gemm_gflop_per_s"]
    return {
        "copy_gb_per_s": max(ceilings["copy_gb_per_s"], others["copy_gb_per_s"]),
        "gemm_gflop_per_s": {dtype: max(rate, others["gemm_gflop_per_s"][dtype]) for dtype, rate in rates.items()},
    }
