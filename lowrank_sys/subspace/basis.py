"""How a matrix keeps its basis: as a matrix in the parameter's dtype, in INT4, as the key of a Gaussian one, as selected rows, or
as selected columns of the DCT.

A store names the tensors that a basis is made of (`keys` of a state, in the order in which ops take them), and reads, writes and
multiplies by them. Which one a state has is told by the state. d is the length of the projected axis.
"""

import torch

from lowrank_sys._ops.int4 import expect_int4
from lowrank_sys._ops.rules import expect, expect_float, expect_like
from lowrank_sys.subspace.gaussian import gaussian_basis


class Dense:
    """`basis` (d, r), in the parameter's dtype."""

    name = "dense"  # in the table of fused steps
    keys = ("basis",)
    optional = ()  # keys that only some states have
    categories = {"basis": "basis"}
    orthonormal = True  # BᵀB is I, to rounding
    reads_all = True  # whether every entry of a gradient is in its projection
    options = {}  # what a state keeps beside the tensors

    def make(self, d, rank, like):
        """The tensors of a basis that is not chosen yet."""
        return (torch.zeros((d, rank), dtype=like.dtype, device=like.device),)

    def rank(self, state):
        return state["basis"].shape[1]

    def present(self, state):
        """The keys that this state has of a basis."""
        return (*self.keys, *(key for key in self.optional if key in state))

    def project_rows(self, x, tensors, rank):
        """x (tokens, d) times the basis that `tensors` are, as `present` orders them: (tokens, rank) fp32."""
        return self.project(x, {**dict(zip((*self.keys, *self.optional), tensors)), "left": False, "rank": rank})

    def fits(self, d, state):
        """Whether this is a basis of vectors of d entries."""
        basis = state["basis"]
        return basis.dim() == 2 and basis.shape[0] == d

    def expect(self, op, state, d, device):
        """Raise an error for tensors that are no basis of vectors of d entries on this device."""
        basis = state["basis"]
        expect(self.fits(d, state), op, lambda: f"basis must have shape ({d}, r), got {tuple(basis.shape)}")
        expect_float(op, "basis", basis)
        expect_like(op, "basis", basis, basis.shape, device)
        expect(basis.shape[1] >= 1, op, lambda: f"rank must be at least 1, got basis of shape {tuple(basis.shape)}")

    def load(self, state, d):
        """The basis (d, r) itself."""
        return state["basis"]

    def write(self, state, new, kept=None):
        """Store `new` (d, r)."""
        state["basis"].copy_(new)

    def project(self, grad, state, *, int8_gemm=False):
        return torch.ops.lowrank.project(grad, state["basis"], left=state["left"], int8_gemm=int8_gemm)

    def back_(self, param, low_rank, state, *, alpha=1.0, int8_gemm=False):
        """param += alpha back(low_rank)."""
        torch.ops.lowrank.back_project_(param, low_rank, state["basis"], alpha=alpha, left=state["left"], int8_gemm=int8_gemm)

    def ready(self, state, d):
        """What `back_rows` takes of the basis, for all of its calls."""
        return self.load(state, d)

    def back_rows(self, low_rank, state, basis, shape, first, end, *, int8_gemm=False):
        """Rows first ... end - 1 of back(low_rank), fp32, for a matrix of this shape; basis: of `ready`."""
        left = state["left"]
        out = low_rank.new_zeros(end - first, shape[1])
        low_rank, basis = (low_rank, basis[first:end]) if left else (low_rank[first:end], basis)
        torch.ops.lowrank.back_project_(out, low_rank.contiguous(), basis.contiguous(), beta=0.0, left=left, int8_gemm=int8_gemm)
        return out


class Int4(Dense):
    """Packed codes (r, ⌈d/2⌉), fp32 scales and offsets (r, ⌈d/group_size⌉): see quantize_int4. d r / 2 bytes, and the scales."""

    name = "int4"
    keys = ("basis", "basis_scale", "basis_offset")
    categories = {"basis": "basis", "basis_scale": "scales", "basis_offset": "scales"}
    orthonormal = False

    def __init__(self, group_size):
        self.group_size = group_size
        self.options = {"group_size": group_size}

    def _tensors(self, state):
        return [state[key] for key in self.keys]

    def make(self, d, rank, like):
        scales = like.new_zeros((rank, -(-d // self.group_size)), dtype=torch.float32)
        return like.new_zeros((rank, -(-d // 2)), dtype=torch.uint8), scales, torch.zeros_like(scales)

    def rank(self, state):
        return state["basis"].shape[0]

    def fits(self, d, state):
        packed = state["basis"]
        return packed.dim() == 2 and packed.shape[1] == -(-d // 2) and state["basis_scale"].shape[1] == -(-d // self.group_size)

    def expect(self, op, state, d, device):
        expect_int4(op, *self._tensors(state), d, self.group_size, device, names=self.keys)

    def load(self, state, d):
        """The basis (d, r) in fp32: a copy, to be dropped soon."""
        return torch.ops.lowrank.dequantize_int4(*self._tensors(state), d=d, group_size=self.group_size)

    def write(self, state, new, kept=None):
        """Store `new` (d, r); where `kept` (0-dim bool) the bytes stay, which rounding again could move."""
        for old, made in zip(self._tensors(state), torch.ops.lowrank.quantize_int4(new, group_size=self.group_size)):
            old.copy_(made if kept is None else torch.where(kept, old, made))

    def project(self, grad, state, *, int8_gemm=False):
        return torch.ops.lowrank.project_int4(grad, *self._tensors(state), left=state["left"], group_size=self.group_size)

    def back_(self, param, low_rank, state, *, alpha=1.0, int8_gemm=False):
        torch.ops.lowrank.back_project_int4_(
            param, low_rank, *self._tensors(state), alpha=alpha, left=state["left"], group_size=self.group_size
        )


class Key(Dense):
    """`key` int64 (4,) of a Gaussian basis: seed, refresh, parameter and first row. Ops make the basis where they use it.

    All but a fused step read the key on the host: where it lies on a GPU, they wait.
    """

    name = "key"
    keys = ("key",)
    categories = {"key": "basis"}
    orthonormal = False

    def rank(self, state):
        if "rank" in state:
            return state["rank"]
        return state["exp_avg"].shape[0 if state["left"] else 1]  # a key does not know it

    def fits(self, d, state):
        return True

    def _which(self, state):
        seed, step, parameter, first = state["key"].tolist()
        return {"seed": seed, "step": step, "parameter": parameter, "first": first}

    def load(self, state, d):
        """The basis (d, r) in fp32, where the moments are."""
        return gaussian_basis(d=d, rank=self.rank(state), device=state.get("exp_avg", state["key"]).device, **self._which(state))

    def project(self, grad, state, *, int8_gemm=False):
        return torch.ops.lowrank.gaussian_project(grad, rank=self.rank(state), left=state["left"], **self._which(state))

    def back_(self, param, low_rank, state, *, alpha=1.0, int8_gemm=False):
        torch.ops.lowrank.gaussian_back_project_(param, low_rank, alpha=alpha, left=state["left"], **self._which(state))


class Rows(Dense):
    """`indices` int32 (r,) of rows of the identity, and where they are drawn `row_scale` fp32 (r,): R gathers, back scatters."""

    name = "rows"
    keys, optional = ("indices",), ("row_scale",)
    categories = {"indices": "basis", "row_scale": "basis"}
    orthonormal = False  # where rows are scaled
    reads_all = False

    def rank(self, state):
        return state["indices"].shape[0]

    def fits(self, d, state):
        return state["indices"].dim() == 1

    def load(self, state, d):
        """The basis (d, r) in fp32, a column a row that is selected."""
        indices, scale = state["indices"].long(), state.get("row_scale")
        basis = torch.zeros(d, len(indices), dtype=torch.float32, device=indices.device)
        basis[indices, torch.arange(len(indices), device=indices.device)] = 1.0 if scale is None else scale
        return basis

    def project(self, grad, state, *, int8_gemm=False):
        return torch.ops.lowrank.gather_rows(grad, state["indices"], state.get("row_scale"), left=state["left"])

    def back_(self, param, low_rank, state, *, alpha=1.0, int8_gemm=False):
        torch.ops.lowrank.scatter_add_rows_(
            param, low_rank, state["indices"], state.get("row_scale"), alpha=alpha, left=state["left"]
        )

    def ready(self, state, d):
        """Nothing: no product is dense."""
        return ()

    def back_rows(self, low_rank, state, basis, shape, first, end, *, int8_gemm=False):
        out, indices = low_rank.new_zeros(end - first, shape[1]), state["indices"]
        if state["left"]:  # whichever lie elsewhere add 0, so that no device is asked how many
            indices = indices - first
            inside = (indices >= 0) & (indices < end - first)
            indices, low_rank = torch.where(inside, indices, 0), torch.where(inside.unsqueeze(1), low_rank, 0)
        else:
            low_rank = low_rank[first:end]
        scale = state.get("row_scale")
        low_rank = low_rank if scale is None else low_rank * (scale.unsqueeze(1) if state["left"] else scale)
        return out.index_add_(0 if state["left"] else 1, indices, low_rank)


class Columns(Dense):
    """`columns` int32 (r,), ascending, of the orthonormal DCT-II matrix (d, d), made where they are used (subspace/dct.py)."""

    name = "columns"
    keys = ("columns",)
    categories = {"columns": "basis"}

    def rank(self, state):
        return state["columns"].shape[0]

    def fits(self, d, state):
        return state["columns"].dim() == 1

    def load(self, state, d):
        """The basis (d, r) in fp32: a copy, to be dropped soon."""
        return torch.ops.lowrank.dct_columns(state["columns"], d=d)

    def project(self, grad, state, *, int8_gemm=False):
        basis = self.load(state, axis_of(grad.shape, state)).to(grad.dtype)
        return torch.ops.lowrank.project(grad, basis, left=state["left"])

    def back_(self, param, low_rank, state, *, alpha=1.0, int8_gemm=False):
        basis = self.load(state, axis_of(param.shape, state)).to(param.dtype)
        torch.ops.lowrank.back_project_(param, low_rank, basis, alpha=alpha, left=state["left"])


DENSE, KEY, ROWS, COLUMNS = Dense(), Key(), Rows(), Columns()


def store_of(state):
    """The store of a state's basis; None for a state that has none."""
    if "group_size" in state:
        return Int4(state["group_size"])
    return next((store for store in (DENSE, KEY, ROWS, COLUMNS) if store.keys[0] in state), None)


def axis_of(shape, state):
    """d, the projected axis of a matrix (m, n)."""
    return shape[0 if state["left"] else 1]


def load(state, param):
    """The basis of `param` (d, r) as a matrix: its own tensor, or a copy in fp32."""
    return store_of(state).load(state, axis_of(param.shape, state))
