"""The processes that train one model together, and what they say to each other."""

import pickle
from collections import Counter

import torch

# Bytes of one message: as in DistributedDataParallel, large enough to be fast, small against a model.
MESSAGE = 25 * 2**20


class World:
    """A process group as the optimizers see it: of one process where torch.distributed is not initialised.

    group: a process group of torch.distributed; None for the default one, whatever it is when it is asked. A copy has the same
    group; one that comes from a file has the default one.
    """

    def __init__(self, group=None):
        self.group = group

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return World, ()

    @property
    def size(self):
        distributed = torch.distributed
        ready = distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size(self.group) if ready else 1

    @torch.no_grad()
    def mean_(self, tensors):
        """Put the mean over all ranks in place of each tensor. The same order, shapes and dtypes on all ranks."""

        def average(flat):
            flat.div_(self.size)
            torch.distributed.all_reduce(flat, group=self.group)

        _in_messages(tensors, average)

    @torch.no_grad()
    def from_first_(self, tensors):
        """Put rank 0's in place of each tensor. The same order, shapes and dtypes on all ranks."""
        _in_messages(tensors, lambda flat: torch.distributed.broadcast(flat, group_src=0, group=self.group))

    def gather(self, value):
        """[`value` of each rank]: what pickle takes."""
        found = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def expect_same(self, what, hint=""):
        """Raise a RuntimeError on all ranks that names the keys of the dict `what` which differ, and the ranks that stand apart.

        Costs one message of a few bytes where nothing differs.
        """
        if self.size == 1:
            return
        digests = self.gather(hash_of(what))
        if len(set(digests)) == 1:
            return
        found = self.gather({key: repr(value) for key, value in what.items()})
        told = [text for key in dict.fromkeys(key for one in found for key in one) if (text := _differing(key, found))]
        more = f" (and {len(told) - 5} more)" if len(told) > 5 else ""
        raise RuntimeError(f"the ranks differ: {'; '.join(told[:5])}{more}{'. ' if hint else ''}{hint}")


def hash_of(what):
    """A few bytes that stand for plain values."""
    import hashlib

    return hashlib.sha256(pickle.dumps(repr(what))).hexdigest()


def _differing(key, found):
    """'key: a on ranks 0, 2; b on rank 1', or nothing if all have the same."""
    values = [one.get(key, "nothing") for one in found]
    kinds = Counter(values)
    if len(kinds) == 1:
        return None
    parts = []
    for value, count in kinds.most_common(3):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        some = ", ".join(ranks[:4]) + (", ..." if count > 4 else "")
        parts.append(f"{value} on rank{'s' if count > 1 else ''} {some}")
    return f"{key} is {', '.join(parts)}"


def _in_messages(tensors, send):
    """`send` one flat tensor after the other that stands for all of `tensors`, and write back what comes of it."""
    kinds = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        for message in _messages(alike):
            if len(message) == 1 and message[0].is_contiguous():
                send(message[0].view(-1))
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in message])
            send(flat)
            for tensor, part in zip(message, flat.split([tensor.numel() for tensor in message])):
                tensor.copy_(part.view_as(tensor))


def _messages(tensors):
    """Lists of neighbours, of MESSAGE bytes at most where it is more than one."""
    message, held = [], 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if message and held + size > MESSAGE:
            yield message
            message, held = [], 0
        message.append(tensor)
        held += size
    if message:
        yield message
