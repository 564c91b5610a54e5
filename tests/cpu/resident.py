"""Memory that a call takes of the machine, whoever allocates it."""

import os
import re
from pathlib import Path

import pytest
import torch

PEAK = Path("/proc/self/clear_refs")
measured = pytest.mark.skipif(not os.access(PEAK, os.W_OK), reason=f"no {PEAK}")


def memory(line):
    """A line of /proc/self/status, in bytes."""
    return int(re.search(line + r":\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def peak_of(call):
    """Bytes by which the resident memory grew at the most in a call."""
    PEAK.write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def allocated(function, *args, **kwargs):
    """Most bytes that torch's allocator handed out inside a call beyond what the call left behind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function(*args, **kwargs)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    now = most = 0
    for _, _, size in changes:
        now += size
        most = max(most, now)
    del kept
    return most - now
