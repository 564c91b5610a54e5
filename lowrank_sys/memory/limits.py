"""How much memory a process may still take: of the machine, of its control groups, of its batch job, of its shell."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

# Files of a control group, version 2 and version 1: limits, use, and what of memory.stat the kernel would drop by itself.
V2 = (("memory.max", "memory.high"), "memory.current", r"(?:active|inactive)_file")
V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", r"total_(?:active|inactive)_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process could still take, the least that anything grants. root: where proc and sys are."""
    return max(0, min([_machine(root), *_groups(root), *_job(root), *_shell(root)]))


def _machine(root: Path) -> int:
    try:
        kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", (root / "proc/meminfo").read_text(), re.M)}
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if "MemAvailable" in kib:
        return kib["MemAvailable"] * 1024
    free = kib["MemFree"] + kib.get("Buffers", 0) + kib.get("Cached", 0) - kib.get("Shmem", 0)  # kernels before 3.14
    return min(free, kib["MemTotal"]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What every control group leaves, from the process's own up to the root."""
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (root / "sys/fs/cgroup/memory", V1) if controllers else (root / "sys/fs/cgroup", V2)
        parts = [part for part in name.split("/") if part]
        # a group outside this namespace is named with "..": only the root of the namespace can be seen
        for depth in range(len(parts) + 1 if ".." not in parts else 1):
            yield from _group(top.joinpath(*parts[:depth]), *files)


def _group(folder: Path, limits: tuple[str, ...], use: str, droppable: str) -> Iterator[int]:
    used = _read(folder / use).strip()
    found = [int(text) for text in (_read(folder / name).strip() for name in limits) if text.isdecimal()]
    if found and used.isdecimal():
        cached = sum(map(int, re.findall(rf"^{droppable} (\d+)", _read(folder / "memory.stat"), re.M)))
        yield min(found) - max(0, int(used) - cached)


def _job(root: Path) -> Iterator[int]:
    """What Slurm grants on this node, in MiB by its variables; 0 means all. It counts resident memory."""
    used = _status(root, "VmRSS")
    granted = {name: os.environ.get(name, "").strip() for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")}
    node, cpu, cpus = (int(value) if value.isdecimal() else 0 for value in granted.values())
    if node:
        yield (node << 20) - used
    elif cpu:
        yield (cpu * max(1, cpus) << 20) - used


def _shell(root: Path) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    for kind, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - _status(root, field)


def _status(root: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", _read(root / "proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
