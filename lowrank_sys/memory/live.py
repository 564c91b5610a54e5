"""Live tensor memory, counted operator by operator: of real tensors, or of fake ones that hold nothing."""

import contextlib
import functools
import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lowrank_sys import backends, reference
from lowrank_sys._ops import named_steps
from lowrank_sys.memory.fakes import Fakes, run, tensors_in
from lowrank_sys.memory.workspace import op_name, scratch_bytes
from lowrank_sys.optim.storages import storages
from lowrank_sys.subspace import operators

# Where the host reads a value.
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)

# Of a fake tensor, `.device` is an operator: most of what a rehearsal dispatches.
DEVICE = torch.ops.prim.device.default

# torch.tensor() shows no other operator, and this one returns its input.
FRESH = torch.ops.aten.lift_fresh.default

# What compositions change in the log, by their signatures: the same in every rehearsal.
_COMPOSITIONS = {}


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of distinct live storages that operators make while the mode is on, and their peak.

    A storage lives until its last reference is gone: views, what autograd saved and what C++ holds included. Scratch memory
    inside an operator is no tensor; `workspace.scratch_bytes` says how much there is, and it counts while the operator runs.
    Ops that are Python here, compositions and the oracle, are run op by op, so that all they allocate is seen; the same op on
    fake tensors of the same sizes is counted again without being run.

    Nobody knows the values of fake tensors. Where the host reads one, numbers are 0 and conditions hold.

    bytes, peak: now, and the most so far. phase: the category of what is allocated next, unless `track` is told another.
    cuda: take the scratch memory of the GPU kernels. fake: the FakeTensorMode that is on, if there is one.
    """

    def __init__(self, cuda=False, fake=None):
        super().__init__()
        self.bytes = self.peak = 0
        self.phase = "other"
        self._cuda = cuda
        self._log = []  # (storage, phase, change in bytes); scratch is storage None
        self._peak_at = 0
        self._marks = {}
        self._alive = {}  # id of a storage -> its entry in the log, and the reference that tells of its end
        self._run = run if fake is None else Fakes(fake)
        served = {row.op for row in backends.table() if row.device == "cpu" and row.implementation == "reference"}
        self._python = {op: reference.IMPLEMENTATIONS[op] for op in served & reference.IMPLEMENTATIONS.keys()}
        self._python |= operators.IMPLEMENTATIONS | named_steps.ALIASES

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func in READS:
            return _read(func, args)
        if func.namespace == "lowrank":
            done = self._step_into(func, args, kwargs)
            if done is not None:
                return done.value
        out, new = self._run(func, args, kwargs)
        for tensor in tensors_in(out) if func is FRESH else new:  # others are views of what may be from before the mode
            self.track(tensor)
        scratch = scratch_bytes(func, args, kwargs, self._cuda)
        if scratch:
            self._change(None, scratch)
            self._change(None, -scratch)
        return out

    def _step_into(self, func, args, kwargs):
        """Run an op that is Python here; its result, None for other ops. What was seen before happens again, unrun."""
        name = op_name(func)
        if name not in self._python:
            return None
        signature = _signature(func, args, kwargs)
        key = None if signature is None else (self._cuda, name in operators.IMPLEMENTATIONS, signature)
        if key in _COMPOSITIONS:
            self._repeat(_COMPOSITIONS[key])
            out, new = self._run(func, args, kwargs)
            for tensor in new:
                self.track(tensor)
            return _Result(out)
        start = len(self._log)
        with self:
            out = self._python[name](*args, **kwargs)
        if key is not None and all(change >= 0 or entry is None or entry >= start for entry, _, change in self._log[start:]):
            _COMPOSITIONS[key] = [(None if entry is None else entry - start, change) for entry, _, change in self._log[start:]]
        return _Result(out)

    def _repeat(self, changes):
        """The changes of an op that was run before; what it left behind is gone at the end."""
        start, left = len(self._log), {}
        for entry, size in changes:
            if entry is not None and size < 0:
                del left[entry]
            elif entry is not None:
                left[entry] = size
            self._change(None if entry is None else entry + start, size)
        for entry, size in left.items():
            self._change(entry + start, -size)

    def track(self, tensor, category=None):
        """Count `tensor`, which may have been there before; with `category`, as such. On the meta device it takes none."""
        if tensor.is_meta:
            return
        for storage in storages(tensor):
            known = self._alive.get(id(storage))
            if known is None:
                key, size = len(self._log), storage.nbytes()
                self._alive[id(storage)] = key, weakref.ref(storage, functools.partial(self._end, id(storage), size))
                self._change(key, size)
            else:
                key = known[0]
            if category is not None:
                self._marks[key] = category

    def _end(self, name, size, _):
        key, _ = self._alive.pop(name)
        self._change(key, -size)

    def _change(self, key, size):
        self._log.append((key, self.phase, size))
        self.bytes += size
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

    def changes(self):
        """[(category, change in bytes)] of all that was allocated and freed, in order; they add up to what is alive."""
        of, found = {None: "workspace"}, []
        for key, phase, size in self._log:
            category = of.setdefault(key, self._marks.get(key, phase))
            found.append((category, size))
        return found

    def _at(self, position):
        sums = Counter({"workspace": 0})
        for category, size in self.changes()[:position]:
            sums[category] += size
        return {category: size for category, size in sums.items() if size or category == "workspace"}


class _Result:
    def __init__(self, value):
        self.value = value


def _signature(func, args, kwargs):
    """What the memory of a composition of fake tensors depends on; None if values may decide."""
    leaves, tree = tree_flatten((args, {key: value for key, value in kwargs.items() if key not in ("seed", "seeds")}))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or not all(isinstance(leaf, FakeTensor) and leaf.constant is None for leaf in tensors):
        return None
    described = ((t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else (type(t), t) for t in leaves)
    return (func, tree, *described)


def _read(func, args):
    try:
        return func(*args)
    except DataDependentOutputException:
        dtype = args[0].dtype
        return True if dtype == torch.bool or func is READS[2] else 0.0 if dtype.is_floating_point else 0
