"""What is timed of a function on a GPU: the replay of its CUDA graph, so that launching it is not; and that apart."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

HOST_CALLS = 7
# A fill that hides a launch is this many times as long as the launch takes; at most so many fills.
HIDES, MOST_FILLS = 1.5, 200


class Prepared(NamedTuple):
    """run: what to time, after `fills` fills of the cache. The rest is None on a CPU."""

    run: Callable
    fills: int = 1
    host_s: float | None = None  # of an eager call, from nothing queued to its return
    launches: int | None = None  # kernels, copies and fills of one call; None where nothing counts them
    eager: str | None = None  # why it is timed eagerly; '' if its graph is


def prepare(function, fill_seconds):
    """`function`, which has run before, as it is timed on the current GPU."""
    host = statistics.median(_host_seconds(function) for _ in range(HOST_CALLS))
    if why := _waits(function):
        return _eager(function, host, why, fill_seconds)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
        graph.instantiate()
    except RuntimeError as error:
        _recover()
        return _eager(function, host, _line(error), fill_seconds)
    graph.replay()
    torch.cuda.synchronize()
    return Prepared(graph.replay, 1, host, _nodes(graph), "")


def _eager(function, host, why, fill_seconds):
    fills = 1 if fill_seconds == 0 else min(MOST_FILLS, math.ceil(HIDES * host / fill_seconds))
    return Prepared(function, max(1, fills), host, _profiled(function), f"not captured: {why}")


def _host_seconds(function):
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _waits(function):
    """Where a call waits for the device, which no capture survives; '' if nowhere."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        return _line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _recover():
    """A capture that failed leaves the default generator as if inside it, where every draw is an error."""
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())


def _nodes(graph):
    """Kernels, copies and fills of a graph."""
    count = ctypes.c_size_t()
    code = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if code == 0 else None


def _profiled(function):
    """The same of an eager call, as the profiler sees them; None where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events()) or None
