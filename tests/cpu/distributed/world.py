"""Some processes that are one world: gloo, on the CPU, through a file."""

import datetime
import faulthandler
import importlib.util
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# Imported once, in a process that every rank is a fork of.
PRELOAD = ["torch", "torch.distributed.tensor", "lowrank_sys.optim", "transformers.models.llama.modeling_llama", "pytest"]
# For ranks to meet, on a busy machine too; and to end by themselves after one of them has failed.
SETUP, GRACE = 60, 3


def run(world_size, function, *args, timeout=60):
    """[what `function(rank, *args)` returns on each rank], in a process group of `world_size` processes.

    function: of a module's top level. args and what it returns: what torch.save takes. An exception of any rank is an
    AssertionError with the tracebacks of all ranks that have one; so is a rank that has not ended `timeout` seconds after all have
    met, with where it stood.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        module, name = sys.modules[function.__module__].__file__, function.__name__
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, module, name, args, timeout), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, SETUP + timeout + GRACE)
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise AssertionError(_told(Path(folder), codes))
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank(rank, world_size, folder, module, name, args, timeout):
    with open(Path(folder, f"{rank}.txt"), "w") as told:
        faulthandler.dump_traceback_later(SETUP, exit=True, file=told)
        try:
            torch.set_num_threads(1)
            limit = datetime.timedelta(seconds=max(SETUP, timeout))
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=limit)
            faulthandler.dump_traceback_later(timeout, exit=True, file=told)
            torch.save(getattr(_load(module), name)(rank, *args), Path(folder, f"{rank}.pt"))
            dist.destroy_process_group()
        except BaseException:
            told.write(traceback.format_exc())
            sys.exit(1)


def _load(path):
    """A module by its file: how the tests are named in sys.modules is pytest's own affair."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _wait(ranks, timeout):
    """Until all have ended, or some time after the first that failed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            end = min(end, time.monotonic() + GRACE)
            break
        time.sleep(0.01)
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _told(folder, codes):
    texts = [(folder / f"{rank}.txt").read_text() if (folder / f"{rank}.txt").exists() else "" for rank in range(len(codes))]
    return "\n".join(f"rank {rank} ended with {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, texts)) if code)
