"""The harness shows what goes wrong on any rank, and never hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import world


def meet(rank, offset):
    mine = torch.tensor(float(rank + offset))
    dist.all_reduce(mine)
    return mine.item(), dist.get_world_size()


def test_ranks_meet_and_return():
    assert world.run(3, meet, 10) == [(33.0, 3)] * 3


def fail(rank):
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def test_an_error_of_one_rank_ends_all():
    with pytest.raises(AssertionError, match="rank 1 ended with 1\n(.|\n)*ValueError: only here"):
        world.run(2, fail)


def hang(rank):
    if rank == 0:
        time.sleep(60)


def test_a_rank_that_hangs_is_named_with_where_it_stood():
    with pytest.raises(AssertionError, match="rank 0 ended with 1\n(.|\n)*test_world.py.*in hang"):
        world.run(2, hang, timeout=2)


def die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_is_killed():
    with pytest.raises(AssertionError, match="rank 1 ended with -9"):
        world.run(2, die)
