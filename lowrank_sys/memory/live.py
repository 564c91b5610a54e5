"""Live tensor memory, counted operator by operator: of real tensors, or of fake ones that hold nothing."""

import contextlib
import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_sys import backends, reference
from lowrank_sys.memory.shapes import SHAPES
from lowrank_sys.memory.storages import storages
from lowrank_sys.memory.workspace import op_name, scratch_bytes
from lowrank_sys.subspace import operators

# Where the host reads a value.
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)

# Of a fake tensor, `.device` is an operator: most of what a rehearsal dispatches.
DEVICE = torch.ops.prim.device.default

# torch.tensor() shows no other operator, and this one returns its input.
FRESH = torch.ops.aten.lift_fresh.default


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of distinct live storages that operators make while the mode is on, and their peak.

    A storage lives until its last reference is gone: views, what autograd saved and what C++ holds included. Scratch memory
    inside an operator is no tensor; `workspace.scratch_bytes` says how much there is, and it counts while the operator runs.
    Ops that are Python here, compositions and the oracle, are run op by op, so that all they allocate is seen.

    Nobody knows the values of fake tensors. Where the host reads one, numbers are 0 and conditions hold, so a refresh is due.

    bytes, peak: now, and the most so far. phase: the category of what is allocated next, unless `track` is told another.
    cuda: take the scratch memory of the GPU kernels.
    """

    def __init__(self, cuda=False):
        super().__init__()
        self.bytes = self.peak = 0
        self.phase = "other"
        self._cuda = cuda
        self._log = []  # (storage, phase, change in bytes); scratch is storage None
        self._peak_at = 0
        self._highest = 0
        self._marks = {}
        self._keys = weakref.WeakKeyDictionary()
        self._known = {}  # scratch of a composition by its signature
        served = {row.op for row in backends.table() if row.device == "cpu" and row.implementation == "reference"}
        self._python = {op: reference.IMPLEMENTATIONS[op] for op in served - operators.IMPLEMENTATIONS.keys()}
        self._python |= operators.IMPLEMENTATIONS

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func in READS:
            return _read(func, args)
        if func.namespace == "lowrank":
            scratch = self._step_into(func, args, kwargs)
            if isinstance(scratch, _Result):
                return scratch.value
        else:
            scratch = None
        if func in SHAPES and isinstance(args[0], FakeTensor):
            out = SHAPES[func](*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        given = {id(storage): storage for tensor in _tensors((args, kwargs)) for storage in storages(tensor)}
        for tensor in _tensors(out):
            if func is FRESH or not any(id(own) in given for own in storages(tensor)):  # a view of something from before the mode
                self.track(tensor)
        if scratch is None:
            scratch = scratch_bytes(func, args, kwargs, self._cuda)
        if scratch:
            self._change(None, scratch)
            self._change(None, -scratch)
        return out

    def _step_into(self, func, args, kwargs):
        """Run an op that is Python here; its result. None for other ops, and the scratch of one that was seen before."""
        name = op_name(func)
        if name not in self._python:
            return None
        signature = _signature(func, args, kwargs)
        if signature in self._known:
            return self._known[signature]
        highest, self._highest = self._highest, self.bytes
        with self:
            out = self._python[name](*args, **kwargs)
        if signature is not None:
            self._known[signature] = self._highest - self.bytes
        self._highest = max(highest, self._highest)
        return _Result(out)

    def track(self, tensor, category=None):
        """Count `tensor`, which may have been there before; with `category`, as such. On the meta device it takes none."""
        if tensor.is_meta:
            return
        for storage in storages(tensor):
            key = self._keys.get(storage)
            if key is None:
                key = self._keys[storage] = len(self._log)
                size = storage.nbytes()
                weakref.finalize(storage, self._change, key, -size).atexit = False
                self._change(key, size)
            if category is not None:
                self._marks[key] = category

    def _change(self, key, size):
        self._log.append((key, self.phase, size))
        self.bytes += size
        self._highest = max(self._highest, self.bytes)
        if self.bytes > self.peak:
            self.peak, self._peak_at = self.bytes, len(self._log)

    @contextlib.contextmanager
    def during(self, phase):
        """What is allocated inside belongs to this category."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def at_peak(self):
        """Bytes at the peak by category; they add up to it."""
        return self._at(self._peak_at)

    def now(self):
        """Bytes by category."""
        return self._at(len(self._log))

    def most_in_blocks(self, below):
        """The most bytes that were alive at once in storages smaller than `below` bytes."""
        live = most = 0
        for _, _, size in self._log:
            live += size if abs(size) < below else 0
            most = max(most, live)
        return most

    def _at(self, position):
        live, scratch = {}, 0
        for key, phase, size in self._log[:position]:
            if key is None:
                scratch += size
            elif size < 0:
                del live[key]
            else:
                live[key] = (self._marks.get(key, phase), size)
        sums = Counter({"workspace": scratch})
        for category, size in live.values():
            sums[category] += size
        return dict(sums)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Result:
    def __init__(self, value):
        self.value = value


def _signature(func, args, kwargs):
    """What the scratch memory of a pure function of fake tensors depends on; None if values may decide, or are written."""
    leaves = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "seed"}))
    if func._schema.is_mutable or not any(isinstance(leaf, FakeTensor) for leaf in leaves):
        return None
    return (func, *((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))


def _read(func, args):
    try:
        return func(*args)
    except DataDependentOutputException:
        dtype = args[0].dtype
        return True if dtype == torch.bool or func is READS[2] else 0.0 if dtype.is_floating_point else 0
