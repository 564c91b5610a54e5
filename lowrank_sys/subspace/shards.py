"""The rows of one matrix on several processes, and what is summed over them."""

from typing import NamedTuple

import torch

# What a state of such rows has beside that of a whole matrix: elements before the first of them, rows of the whole, and the name of
# the process group that has them all.
KEYS = ("offset", "rows", "sums")


class Part:
    """Base of the parts of a method. sharded: whether it serves matrices whose rows lie on several processes: it then forms sums
    over rows by the shard's `sum` alone. unsharded: why not. Every class says so itself: neither is inherited."""

    sharded = False
    unsharded = "its class does not say that it does"

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.sharded = cls.__dict__.get("sharded", False)
        cls.unsharded = cls.__dict__.get("unsharded", Part.unsharded)


class Shard(NamedTuple):
    """Rows `first` ... of a matrix of `rows`, whose other rows are with the other processes of `group`, a name; "" where all are
    here. All processes of the group take part in a sum, also one without any rows, and get the same bits."""

    first: int = 0
    rows: int | None = None
    group: str = ""

    def sum(self, tensor):
        """The sum over the group of tensors of one shape."""
        if not self.group:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=_process_group(self.group))
        return total

    def share(self, tensor):
        """The tensor of the group's first process: what each has computed from the same numbers may differ between machines."""
        if not self.group:
            return tensor
        shared = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.broadcast(shared, group_src=0, group=_process_group(self.group))
        return shared

    def norms(self, norms):
        """Norms over all rows from those over the rows here."""
        return self.sum(norms.double().square()).sqrt().to(norms.dtype) if self.group else norms

    def any(self, flags):
        """Whether a flag (bool) is set on any process."""
        return self.sum(flags.to(torch.int32)) > 0 if self.group else flags

    def of(self, tensor, count):
        """The `count` rows that are here of a tensor of all rows."""
        return tensor[self.first : self.first + count] if self.group else tensor


WHOLE = Shard()


def shard_of(state, row):
    """The shard that a state is of; row: elements of a row."""
    return Shard(state["offset"] // max(1, row), state["rows"], state["sums"]) if "sums" in state else WHOLE


def _process_group(name):
    return torch.distributed.distributed_c10d._resolve_process_group(name)
