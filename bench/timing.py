"""Interleaved timing: one call of every variant a round, caches flushed before each, so that drift hits all alike.

On a GPU a call is the replay of a CUDA graph between two events: see bench/capture.py.
"""

import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank_sys.bench import capture

# Bytes written between two calls on a CPU that does not tell the size of its caches.
LEAST_FILL = 32 << 20
# A round is disturbed if other guests of the host took more than this share of the cores while it ran.
STOLEN = 0.01
# How many times as long as asked for a measurement may take, to replace disturbed rounds.
PATIENCE = 2.0


def quantile(values, q):
    """The q-quantile of a list of numbers, interpolated."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Spread(NamedTuple):
    """Of samples: quantiles, and how far off another run's median may be: 0.1 is 1.1 times as long, or as short."""

    p20: float
    median: float
    p80: float
    relative: float | None  # of one sample nothing is known


def spread(passes):
    """The Spread of samples [[one pass], ...].

    As far off as p20, p80 or the median of any pass: the samples of a pass share where their memory lies and what the machine
    did in that moment, those of another pass, or of another run, do not.
    """
    values = [value for samples in passes for value in samples]
    p20, median, p80 = (quantile(values, q) for q in (0.2, 0.5, 0.8))
    seen = [p20, p80, *(quantile(samples, 0.5) for samples in passes)]
    return Spread(p20, median, p80, max(factor(value, median) for value in seen) - 1 if len(values) > 1 else None)


def factor(a, b):
    """How many times one of two times is the other, at least 1."""
    return max(a / b, b / a)


def parts(values, count=5):
    """Consecutive samples as passes: what drifts from the first to the last of them shows."""
    count = min(count, len(values))
    return [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]


def ratio(passes, base):
    """(times over base, whether that is noise: whether 1 is within its spread; None of one sample).

    Samples of one round are compared with each other, so drift cancels; a base that was timed once is compared with every
    sample.
    """
    once = sum(map(len, base)) == 1
    found = spread(
        [
            [t / base[0][0] for t in samples] if once else [t / b for t, b in zip(samples, others)]
            for samples, others in zip(passes, base * len(passes) if once else base)
        ]
    )
    return found.median, None if found.relative is None else factor(found.median, 1) <= 1 + found.relative


class Timer:
    """Seconds of one call on a device; from cold caches, unless flush is off.

    graphs: whether `interleave` replays CUDA graphs on a GPU; not of functions that do something else at every call.
    quiet: whether nothing disturbed the rounds that the last `interleave` returned.
    prepared: {name: capture.Prepared} of the functions of the last `interleave`.
    """

    quiet = True

    def __init__(self, device, flush=True, graphs=True):
        self.device = torch.device(device)
        self._gpu = self.device.type == "cuda"
        size = 256 << 20 if self._gpu else max(_largest_cache(), LEAST_FILL)
        self._filler = torch.empty(size if flush else 0, dtype=torch.uint8, device=self.device)
        self._graphs = graphs and self._gpu
        self._fill_seconds = min(self(self._fill) for _ in range(5)) if self._graphs and flush else 0.0
        self.prepared = {}

    def synchronize(self):
        if self._gpu:
            torch.cuda.synchronize(self.device)

    def _fill(self):
        self._filler.fill_(1)

    def __call__(self, function):
        return self._time(capture.Prepared(function))

    def _time(self, prepared):
        for _ in range(prepared.fills):
            self._fill()
        if self._gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            prepared.run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        start = time.perf_counter()
        prepared.run()
        return time.perf_counter() - start

    def interleave(self, functions, *, seconds, at_least=7, at_most=200, warmup=2):
        """Seconds of each call of each of `functions` {name: function}, {name: [seconds, ...]}; item i is round i.

        Stops after `at_least` rounds once `seconds` have passed, or after `at_most`, if that is more. The order of a round
        is random, since what ran before warms or cools the machine. On a CPU disturbed rounds do not count, unless too few
        others were found in PATIENCE times as long.
        """
        for function in functions.values():
            for _ in range(warmup):
                function()
        self.synchronize()
        make = (lambda function: capture.prepare(function, self._fill_seconds)) if self._graphs else capture.Prepared
        self.prepared = {name: make(function) for name, function in functions.items()}
        order, shuffle = list(functions), random.Random(0).shuffle
        rounds = []  # (share of the cores that was stolen, {name: seconds})
        start, wanted = time.monotonic(), max(at_least, at_most)
        quiet = 0
        while quiet < wanted:
            elapsed = time.monotonic() - start
            if elapsed > seconds and quiet >= at_least or elapsed > PATIENCE * seconds and len(rounds) >= at_least:
                break
            shuffle(order)
            with _Stolen() as stolen:
                times = {name: self._time(self.prepared[name]) for name in order}
            share = 0.0 if self._gpu else stolen.share  # who waits for the host's cores does not keep a GPU waiting
            rounds.append((share, times))
            quiet += share <= STOLEN
        limit = max(STOLEN, sorted(share for share, _ in rounds)[at_least - 1])
        self.quiet = limit == STOLEN
        kept = [times for share, times in rounds if share <= limit]
        return {name: [times[name] for times in kept] for name in functions}


class _Stolen:
    """Share of this machine's CPU time that its host gave to other guests while the context was open; 0 where unknown."""

    def __enter__(self):
        self._stolen, self._start = self._seconds(), time.perf_counter()
        return self

    def __exit__(self, *_):
        available = (time.perf_counter() - self._start) * os.cpu_count()
        self.share = (self._seconds() - self._stolen) / available

    @staticmethod
    def _seconds():
        try:
            with open("/proc/stat", encoding="ascii") as file:
                return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):  # another system, or a kernel that does not count it
            return 0.0


def extra_bytes(function, device):
    """Most bytes that `function` holds at once beyond what was held before it.

    On a CPU this is the growth of the process's peak resident memory, whoever allocates.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def _largest_cache():
    """Bytes of the largest CPU cache; 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=0)
