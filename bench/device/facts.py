"""What the machine is, who serves each op, and what its ceilings are."""

import torch

from lowrank_sys import backends, info
from lowrank_sys.bench import machine, timing
from lowrank_sys.bench.cases import PACKAGES
from lowrank_sys.bench.device.setting import Failed


def run(setting):
    facts = info.collect()
    del facts["ops"]
    setting.write(**machine.describe(setting.device) | facts | _card(setting))
    missing = {name: why for name, package in PACKAGES.items() if (why := machine.absent(*package))}
    setting.write(missing=missing)
    served = [row for row in backends.table() if row.device == setting.device]
    for row in served:
        setting.write(**row._asdict())
    found = ceilings(setting)
    setting.write(ceilings=found)
    if setting.device == "cuda" and (slow := backends.slow("cuda")):
        raise Failed(slow)
    rates = ", ".join(f"{dtype} {rate / 1e3:.1f} TFLOP/s" for dtype, rate in found["gemm_gflop_per_s"].items())
    print(f"copy {found['copy_gb_per_s']:.0f} GB/s, {rates}" + (f"; without {', '.join(missing)}" if missing else ""))


def ceilings(setting):
    """Of a copy and of bf16 products; tf32 is among those of a GPU by itself."""
    if setting.dry:
        machine.COPIED, machine.SQUARE = 1 << 20, 64
    return machine.ceilings(timing.Timer(setting.device), [torch.bfloat16])


def _card(setting):
    if setting.dry:
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }
