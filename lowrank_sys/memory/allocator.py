"""glibc's allocator: how much it holds beyond the tensors, and how to make it hold less."""

import ctypes
import os
from pathlib import Path

from lowrank_sys.memory import limits

# Blocks above this come from the kernel and go back to it at once. glibc's own threshold climbs to 32 MiB, and freed blocks
# below it stay. llama-60m, 4 x 128 tokens, fp32: peak 1.92 GB by default and with 8 or 32 MiB, 1.75 GB with 1 MiB or 64 KiB;
# the page faults cost 1% to 24% more CPU time a step with 1 MiB, 18% to 34% with 64 KiB.
MMAP_THRESHOLD = 1 << 20

# By default the heap holds freed blocks that aligned requests cannot take again: as a share of the most bytes that were alive
# in blocks below HEAP_BLOCK, 0.54 measured on llama-60m, 0.66 on llama-350m (glibc 2.36).
HEAP_BLOCK, HEAP_SHARE = 32 << 20, 0.6
# With MMAP_THRESHOLD, of all tensors: rounding to pages, and small blocks.
TIGHT_SHARE = 0.02
# PyTorch's caching allocator on a GPU: rounding and blocks that fit nothing. Stated, not measured.
CUDA_SHARE = 0.05

M_MMAP_THRESHOLD = -3  # malloc.h
VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # sets it from outside


def available_bytes():
    """Memory that this process could still take."""
    return limits.available_bytes(Path("/"))


def is_tight(model, available):
    """Whether gradients and AdamW's moments, the most that is still to come beside activations, would take half of
    `available` bytes."""
    to_come = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
    return 2 * to_come > available


def should_save(args, model, available):
    """Whether `lowrank train` of `args`, settled, lets freed blocks go back: the run asks for little memory, or has little."""
    return args.per_layer is not None or args.weights != "float" or is_tight(model, available)


def is_saving():
    """Whether freed blocks go back because the environment says so."""
    chosen = os.environ.get(VARIABLE, "")
    return chosen.isdigit() and int(chosen) <= MMAP_THRESHOLD


def save_memory():
    """Give freed blocks above MMAP_THRESHOLD back to the system. True if the C library takes it (glibc)."""
    if VARIABLE in os.environ:
        return False  # the user has chosen
    try:
        return ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) == 1
    except (AttributeError, OSError):
        return False
