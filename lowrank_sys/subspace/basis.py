"""How a matrix keeps its basis: as a matrix in the parameter's dtype, or in INT4.

A store names the tensors that a basis is made of (`keys` of a state, in the order in which ops take them), reads and writes
them, and holds what ops want to know beside them. Which one a state has is told by the state.
"""

import torch


class Dense:
    """(d, r), in the parameter's dtype."""

    keys = ("basis",)
    categories = {"basis": "basis"}
    overload = "list"  # of the list forms of steps
    options = {}  # keyword arguments of these

    def make(self, d, rank, like):
        """The tensors of a basis that is not chosen yet."""
        return (like.new_zeros((d, rank)),)

    def rank(self, basis):
        return basis.shape[1]

    def fits(self, d, basis):
        """Whether this is a basis of vectors of d entries."""
        return basis.dim() == 2 and basis.shape[0] == d

    def load(self, basis, *, d):
        """The basis (d, r) itself."""
        return basis

    def write(self, basis, *, new, kept=None):
        """Store `new` (d, r)."""
        basis.copy_(new)

    def project(self, grad, basis, *, left, int8_gemm=False):
        return torch.ops.lowrank.project(grad, basis, left=left, int8_gemm=int8_gemm)


class Int4:
    """Packed codes (r, ⌈d/2⌉), fp32 scales and offsets (r, ⌈d/group_size⌉): see quantize_int4. d r / 2 bytes, and the scales."""

    keys = ("basis", "basis_scale", "basis_offset")
    categories = {"basis": "basis", "basis_scale": "scales", "basis_offset": "scales"}
    overload = "int4"

    def __init__(self, group_size):
        self.group_size = group_size
        self.options = {"group_size": group_size}

    def make(self, d, rank, like):
        scales = like.new_zeros((rank, -(-d // self.group_size)), dtype=torch.float32)
        return like.new_zeros((rank, -(-d // 2)), dtype=torch.uint8), scales, torch.zeros_like(scales)

    def rank(self, packed, scale, offset):
        return packed.shape[0]

    def fits(self, d, packed, scale, offset):
        return packed.dim() == 2 and packed.shape[1] == -(-d // 2) and scale.shape[1] == -(-d // self.group_size)

    def load(self, packed, scale, offset, *, d):
        """The basis (d, r) in fp32: a copy, to be dropped soon."""
        return torch.ops.lowrank.dequantize_int4(packed, scale, offset, d=d, group_size=self.group_size)

    def write(self, *stored, new, kept=None):
        """Store `new` (d, r); where `kept` (0-dim bool) the bytes stay, which rounding again could move."""
        for old, made in zip(stored, torch.ops.lowrank.quantize_int4(new, group_size=self.group_size)):
            old.copy_(made if kept is None else torch.where(kept, old, made))

    def project(self, grad, packed, scale, offset, *, left):
        return torch.ops.lowrank.project_int4(grad, packed, scale, offset, left=left, group_size=self.group_size)


DENSE = Dense()


def chosen(group):
    """The store for new states of a group."""
    return Int4(group["quant_group_size"]) if group["quant"] else DENSE


def store_of(state):
    """The store of a state that has a basis."""
    return Int4(state["group_size"]) if "group_size" in state else DENSE


def parts(state):
    """(store, the tensors of its basis)."""
    store = store_of(state)
    return store, [state[key] for key in store.keys]


def load(state, param):
    """The basis of `param` (d, r) as a matrix: its own tensor, or a copy in fp32 of one in INT4."""
    store, tensors = parts(state)
    return store.load(*tensors, d=param.shape[0 if state["left"] else 1])


def alike(kind, states, *lists):
    """Yield (kind, states, *lists) for each value of kind(state): what one call of an op can serve."""
    kinds = [kind(state) for state in states]
    if len(set(kinds)) <= 1:
        if states:
            yield kinds[0], states, *lists
        return
    for value in dict.fromkeys(kinds):
        at = [i for i, other in enumerate(kinds) if other == value]
        yield value, *([items[i] for i in at] for items in (states, *lists))
