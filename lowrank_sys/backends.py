"""Which implementation serves each op on each device, and why. Filled once at import, printed by `lowrank info`.

`LOWRANK_BACKEND=reference` turns every kernel off: the oracle serves all ops. Nothing is compiled with C++ or nvcc at run time;
Triton compiles its kernels by itself, and what launches them with the machine's C compiler.
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank_sys import _ops, reference
from lowrank_sys._ops import named_steps
from lowrank_sys._ops.rules import implement
from lowrank_sys.subspace import operators

# Launchers of the GEMM-shaped ops on a GPU: op -> (module of lowrank_sys.kernels, function).
TRITON = {
    "project": ("project", "project"),
    "back_project_": ("back_project", "back_project_"),
    "back_project_int4_": ("back_project", "back_project_int4_"),
    "back_project_int8_": ("back_project", "back_project_int8_"),
    "back_project_int8_.tensor": ("back_project", "back_project_int8_"),
    "gaussian_back_project_": ("gaussian", "gaussian_back_project_"),
    "gaussian_basis_": ("gaussian", "gaussian_basis_"),
    "gaussian_project": ("gaussian", "gaussian_project"),
    "int8_linear": ("int8_linear", "int8_linear"),
    "int8_linear_backward": ("int8_linear", "int8_linear_backward"),
    "nf4_linear": ("int8_linear", "nf4_linear"),
    "nf4_linear_backward": ("int8_linear", "nf4_linear_backward"),
    "project_int4": ("project", "project_int4"),
    "scatter_add_product": ("scatter_add", "scatter_add_product"),
    "step": ("step", "step"),
}


class Served(NamedTuple):
    """One row of the table: who serves `op` on `device`, and why no better one does."""

    op: str
    device: str
    implementation: str
    reason: str


def build_record():
    """What the native build wrote about itself: compiler, flags, CUDA, or why there is none."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _load_native():
    """Load the C++ module; its CPU (and CUDA) kernels register themselves. Returns why it is missing, or ''."""
    if os.environ.get("LOWRANK_BACKEND") == "reference":
        return "LOWRANK_BACKEND=reference"
    if importlib.util.find_spec("lowrank_sys._C") is None:
        return build_record().get("reason") or "lowrank_sys._C is not built"
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "the C++ kernels need AVX2"
    try:
        importlib.import_module("lowrank_sys._C")
    except ImportError as error:
        return f"lowrank_sys._C does not load: {error}"
    return ""


def _no_device():
    if os.environ.get("LOWRANK_BACKEND") == "reference":
        return "LOWRANK_BACKEND=reference"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _load_cuda():
    """Load the CUDA C++ module, where there is a device to serve. Returns why it is missing, or ''."""
    if missing := _no_device():
        return missing
    if importlib.util.find_spec("lowrank_sys._cuda") is None:
        return f"built without CUDA sources: {build_record().get('cuda', 'no native build')}"
    try:
        importlib.import_module("lowrank_sys._cuda")
    except ImportError as error:
        return f"lowrank_sys._cuda does not load: {error}"
    return ""


def _load_triton():
    """Register the Triton launchers for CUDA tensors. Returns why there are none, or ''."""
    if missing := _no_device():
        return missing
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as triton looks for one
        return "triton needs a C compiler: gcc or clang on PATH, or CC"
    for op, (module, function) in TRITON.items():
        launcher = getattr(importlib.import_module(f"lowrank_sys.kernels.{module}"), function)
        implement(op, launcher, "CUDA")
    return ""


def _serves(op, key):
    name, _, overload = op.partition(".")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank::{name}" + (f".{overload}" if overload else ""), key)


def table():
    """Rows `Served`, op by op: the CPU, and CUDA where this machine has a device."""
    rows = {}
    devices = [("cpu", "CPU", "C++")] + ([("cuda", "CUDA", "CUDA C++")] if torch.cuda.is_available() else [])
    for op in sorted(_ops.SCHEMAS, key=lambda op: op in named_steps.FORMS):  # what an alias calls comes before it
        for device, key, native in devices:
            if op in named_steps.FORMS:
                served = named_steps.served_by(op)
                rows[op, device] = Served(op, device, rows[served, device].implementation, f"alias of {served}")
            elif device == "cuda" and op in TRITON and not TRITON_MISSING:
                rows[op, device] = Served(op, device, "Triton", "")
            elif op in operators.IMPLEMENTATIONS:
                rows[op, device] = Served(op, device, "composition", "calls the other ops and torch.linalg")
            elif _serves(op, key):
                rows[op, device] = Served(op, device, native, "")
            else:
                missing = NATIVE_MISSING if device == "cpu" else TRITON_MISSING if op in TRITON else CUDA_MISSING
                rows[op, device] = Served(op, device, "reference", missing or "built without it")
    return list(rows.values())


def slow(device):
    """One line that says which ops the oracle serves on `device` ("cpu" or "cuda") and why; '' where kernels serve all."""
    why = {}
    for row in table():
        if row.device == device and row.implementation == "reference" and row.op not in named_steps.FORMS:
            why.setdefault(row.reason, []).append(row.op)
    parts = (f"{len(ops)} ops ({', '.join(ops[:4])}{', ...' if len(ops) > 4 else ''}): {reason}" for reason, ops in why.items())
    return f"slow: plain PyTorch in place of kernels serves {'; '.join(parts)}" if why else ""


reference.register()
operators.register()
named_steps.register()
NATIVE_MISSING = _load_native()
CUDA_MISSING = _load_cuda()
TRITON_MISSING = _load_triton()
