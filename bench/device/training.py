"""A few steps of whole models, built as `lowrank train` builds them: time, tokens a second, peaks of memory, one profile."""

import argparse
import functools
import gc
import statistics
import time
from typing import NamedTuple

import torch

from lowrank_sys.bench import machine
from lowrank_sys.bench.device.setting import Skipped

# What a card of 24 GB can give: the context and the desktop take the rest.
CAP = int(22.5 * 2**30)
PROFILED = 25  # kernels
RESERVE = 20.0  # seconds without which no run begins


class Run(NamedTuple):
    model: str
    method: str
    flags: str  # of lowrank train
    batch: int
    seq_len: int
    steps: int
    warmup: int
    capped: bool = False  # whether the process may take no more than CAP
    profiled: bool = False

    @property
    def name(self):
        return " ".join(filter(None, (self.model, self.method, self.flags, f"{self.batch}x{self.seq_len} tokens")))


LEAN = "--per-layer in_backward --gradient-checkpointing"
RUNS = [
    *(
        Run("llama-7b", "q-galore", f"--rank {rank} {LEAN}", 1, tokens, 7, 2, True, (rank, tokens) == (128, 2048))
        for tokens in (2048, 256)
        for rank in (128, 1024)
    ),
    *(
        Run(model, method, flags, 16, 256, 30, 5)
        for model in ("llama-60m", "llama-350m")
        for method, flags in (("galore", "--rank 128"), ("adamw", ""))
    ),
]
TOYS = [
    Run("llama-1m", "q-galore", f"--rank 8 {LEAN}", 1, 16, 3, 1, True, True),
    *(Run("llama-1m", method, flags, 2, 16, 2, 1) for method, flags in (("galore", "--rank 8"), ("adamw", ""))),
]


def run(setting):
    if why := machine.absent("transformers", "transformers"):
        raise Skipped(why)
    runs, built = TOYS if setting.dry else RUNS, Models(setting.device)
    setting.write(**machine.describe(setting.device))
    setting.each({each.name: functools.partial(_rows, each, built) for each in runs}, reserve=0.0 if setting.dry else RESERVE)


class Models:
    """The model of the last run, kept for the next one if that has the same."""

    def __init__(self, device):
        self.device, self.key, self.model = torch.device(device), None, None

    def get(self, name, int8):
        from lowrank_sys.train import models

        if self.key != (name, int8):
            self.key = self.model = None
            self.free()
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            self.model = models.build(
                models.config(name, seq_len=2048), dtype=dtype, device=self.device, weights="int8" if int8 else "float"
            )
            self.key = (name, int8)
        return self.model.train()

    def free(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def arguments(run):
    """Those of `lowrank train`."""
    from lowrank_sys.train import flags

    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    words = ["--model", run.model, "--method", run.method, "--batch-size", str(run.batch), "--seq-len", str(run.seq_len)]
    args = parser.parse_args([*words, *run.flags.split()])
    flags.check(args)
    return args


def _rows(run, built):
    from lowrank_sys.nn import causal_lm_loss
    from lowrank_sys.train import methods

    gpu, args = built.device.type == "cuda", arguments(run)
    if gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / whole) if run.capped else 1.0)
    int8 = methods.settle(args).weights == "int8"
    model = built.get(run.model, int8)
    built.free()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = methods.build(model, args)
    draw = torch.Generator(built.device).manual_seed(0)

    def step():
        start = time.perf_counter()
        ids = torch.randint(model.config.vocab_size, (run.batch, run.seq_len), generator=draw, device=built.device)
        loss = causal_lm_loss(model, ids, ids) if int8 else model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), time.perf_counter() - start  # .item() waits for all of it

    try:
        losses, seconds = zip(*(step() for _ in range(run.steps)))
        median = statistics.median(seconds[run.warmup :])
        yield {
            "model": run.model,
            "method": run.method,
            "flags": run.flags,
            "batch": run.batch,
            "seq_len": run.seq_len,
            "median_s": median,
            "tokens_per_s": run.batch * run.seq_len / median,
            "first_step_s": seconds[0],
            "steps_s": seconds,
            "losses": losses,
            **_peaks(gpu, run.capped),
            "check": "ok" if all(loss == loss and loss < 1e3 for loss in losses) else "the loss is not finite",
        }
        if run.profiled:
            yield from _profile(step, gpu)
    finally:
        optimizer.release()
        optimizer.zero_grad()
        model.gradient_checkpointing_disable()


def _peaks(gpu, capped):
    if not gpu:
        return {}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "cap_bytes": CAP if capped else None,
    }


def _profile(step, gpu):
    """What one step spends its time on, the most first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as seen:
        step()
    spent = {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in seen.key_averages()
    }
    whole = sum(time for time, _ in spent.values())
    for name, (time_us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:PROFILED]:
        yield {"kernel": name, "profiled_s": time_us / 1e6, "share": time_us / whole, "calls": count}
