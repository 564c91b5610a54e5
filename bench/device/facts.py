"""What the machine is, who serves each op, and what its ceilings are."""

import torch

from lowrank_sys import backends, info
from lowrank_sys.bench import machine, timing
from lowrank_sys.bench.cases import PACKAGES
from lowrank_sys.bench.device.setting import Failed


def run(setting):
    facts = info.collect()
    del facts["ops"]
    setting.write(**machine.describe(setting.device), **facts, **_card(setting))
    setting.write(missing={name: why for name, package in PACKAGES.items() if (why := machine.absent(*package))})
    served = [row for row in backends.table() if row.device == setting.device]
    for row in served:
        setting.write(**row._asdict())
    setting.write(ceilings=ceilings(setting))
    fallen = [row.op for row in served if row.device == "cuda" and row.implementation == "reference"]
    if fallen:
        raise Failed(f"served by the reference: {', '.join(fallen)} ({served[0].reason or backends.TRITON_MISSING})")


def ceilings(setting):
    if setting.dry:
        machine.COPIED, machine.SQUARE = 1 << 20, 64
    dtypes = [torch.float32] if setting.dry else [torch.bfloat16]  # tf32 is among a GPU's by itself
    return machine.ceilings(timing.Timer(setting.device), [*dtypes, *([torch.bfloat16] if setting.dry else [])])


def _card(setting):
    if setting.dry:
        return {}
    found = torch.cuda.get_device_properties(0)
    return {"compute_capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory, "l2_bytes": found.L2_cache_size, "cuda": torch.version.cuda}
