"""`lowrank info`: versions, devices, the native build, and which implementation serves each op here."""

import json
import platform
from importlib import metadata
from pathlib import Path

import torch

import lowrank_sys
from lowrank_sys import backends
from lowrank_sys.optim.fused import FUSED

# What a fused step of an optimizer is of; any other combination of parts takes the general route.
PARTS = ("weight", "basis", "moments", "rule", "remainder")


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def collect():
    """Everything `lowrank info` knows, as plain JSON values."""
    return {
        "lowrank-sys": lowrank_sys.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "devices": devices(),
        "native build": _build(),
        "ops": [row._asdict() for row in backends.table()],
        "fused steps": [dict(zip(PARTS, (part or "none" for part in row))) for row in FUSED],
    }


def devices():
    """Names of this machine's devices, the CPU first."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cpu = f"cpu: {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [cpu] + [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(gpus)]


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build():
    if backends.NATIVE_MISSING:
        return {"status": f"none ({backends.NATIVE_MISSING})"}
    return backends.build_record() or {"status": "loaded"}


def run(args):
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key in ("lowrank-sys", "python", "torch", "triton"):
        print(f"{key:14}{facts[key]}")
    for i, device in enumerate(facts["devices"]):
        print(f"{'devices' if i == 0 else '':14}{device}")
    for i, (key, value) in enumerate(facts["native build"].items()):
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{'native build' if i == 0 else '':14}{value if key == 'status' else f'{key}: {value}'}")
    _print_table([("op", "device", "served by", "why"), *(tuple(row.values()) for row in facts["ops"])])
    _print_table([PARTS, *(tuple(row.values()) for row in facts["fused steps"])])
    return 0


def _print_table(rows):
    print()
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
