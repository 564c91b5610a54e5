"""The low-rank part of a quantized weight: a factor on a frozen basis, beside codes that stay as they are until it is merged."""

import torch

from lowrank_sys.subspace.basis import axis_of, store_of

# Buffers of a layer whose weight has a part: the trained factor, fp32, whose name says on which side the basis is, and the basis.
FACTORS = {"factor_of_left": True, "factor_of_right": False}
BASIS = ("basis", "basis_scale", "basis_offset")
NAMES = (*FACTORS, *BASIS)


class LowRankPart:
    """B X with a basis B (m, r) on the left and the factor X (r, n); or X Bᵀ with B (n, r) on the right and X (m, r).

    tensors: a layer's buffers, of which `FACTORS` and `BASIS` are the part's. shape: (m, n) of the weight.
    """

    def __init__(self, tensors, shape):
        name = next(name for name in FACTORS if tensors.get(name) is not None)
        self.factor = tensors[name]
        self.state = {key: tensors[key] for key in BASIS if tensors.get(key) is not None}
        self.state["left"] = FACTORS[name]
        self._d = axis_of(shape, self.state)
        if "basis_scale" in self.state:  # in INT4: where all is one group, any size that holds it
            groups = self.state["basis_scale"].shape[1]
            self.state["group_size"] = next((32 << i for i in range(5) if -(-self._d // (32 << i)) == groups), 1024)
        self._store = store_of(self.state)

    def expect(self, shape):
        """Raise a RuntimeError for a basis that is none of a weight of this shape."""
        self._store.expect("low-rank part", self.state, axis_of(shape, self.state), self.factor.device)

    def add_to(self, values):
        """values (m, n) += the part, in place."""
        self._store.back_(values, self.factor, self.state)

    def times(self, rows, back=False):
        """x (..., n) times the part's transpose; or with `back` dy (..., m) times the part. In the rows' type."""
        flat, right = rows.reshape(-1, rows.shape[-1]).contiguous(), {**self.state, "left": False}
        factor = self.factor.to(rows.dtype)
        factor = factor if back else factor.T
        if self.state["left"] == back:
            out = self._store.project(flat, right).to(rows.dtype) @ factor
        else:
            out = flat.new_zeros(len(flat), self._d)
            self._store.back_(out, (flat @ factor).float().contiguous(), right)
        return out.reshape(*rows.shape[:-1], out.shape[-1])


def part_of(tensors, shape):
    """The part of a layer with these buffers and a weight of this shape, or None."""
    return LowRankPart(tensors, shape) if any(tensors.get(name) is not None for name in FACTORS) else None


def check_part(tensors, shape):
    """Raise a ValueError for buffers of a layer that are no part of a weight of this shape."""
    sides, basis = ([key for key in keys if tensors.get(key) is not None] for keys in (FACTORS, BASIS))
    if not sides and not basis:
        return
    if len(sides) != 1 or basis not in (["basis"], [*BASIS]):
        raise ValueError(f"a low-rank part must be one of {', '.join(FACTORS)} with a basis, got {', '.join((*sides, *basis))}")
    (name,), left, factor = sides, FACTORS[sides[0]], tensors[sides[0]]
    rank, other = tensors["basis"].shape[0 if basis == [*BASIS] else -1], shape[1 if left else 0]
    wanted = (rank, other) if left else (other, rank)
    if factor.dtype != torch.float32 or tuple(factor.shape) != wanted:
        raise ValueError(f"{name} must be torch.float32 of shape {wanted}, got {factor.dtype} of {tuple(factor.shape)}")
    try:
        LowRankPart(tensors, shape).expect(shape)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def put_part(tensors, factor, state):
    """Give a layer with these buffers a part: `factor`, and a copy of the basis of a state with `left`."""
    drop_part(tensors)
    tensors[next(name for name, left in FACTORS.items() if left == state["left"])] = factor
    tensors.update({key: state[key].clone() for key in BASIS if key in state})


def drop_part(tensors):
    for name in NAMES:
        tensors.pop(name, None)
