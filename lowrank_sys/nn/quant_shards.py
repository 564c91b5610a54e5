"""INT8 weights that torch's fully_shard takes: rows of codes and scales on each process, gathered as they are."""

import sys

import torch
from torch import nn

from lowrank_sys.nn.codings import Int8
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.quant_weight import is_quantized, rows_here, settle

aten = torch.ops.aten
STORED = ("codes", "scale")


class QuantShard(torch.Tensor):
    """Rows of an INT8 weight, which looks as they do in the compute dtype. What it is made of is in `codes` and `scale`.

    fully_shard splits it into rows, and gathers codes and scales: of a weight (m, n) m n + 4 m ⌈n/group_size⌉ bytes cross the wire,
    in whatever dtype the layer computes. Gradients of it are ordinary float tensors.

    Args:
        codes: (rows, n) int8. scale: (rows, ⌈n/group_size⌉) fp32.
        group_size: neighbours of a row that share a scale.
        dtype: of the weight as it looks, and of its gradient.
        whole: rows of the whole weight, m.
    """

    coding = Int8
    _is_quantized = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes, scale, group_size, dtype, whole):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, group_size, dtype, whole):
        self.codes, self.scale, self.group_size, self.whole = codes, scale, group_size, whole

    def __tensor_flatten__(self):
        return list(STORED), (self.group_size, self.dtype, self.whole)

    @staticmethod
    def __tensor_unflatten__(tensors, kept, size, stride):
        return QuantShard(*(tensors[name] for name in STORED), *kept)

    @property
    def _tensors(self):
        return {name: getattr(self, name) for name in STORED}

    def __repr__(self):
        return f"QuantShard({tuple(self.shape)} of {self.whole} rows, group_size={self.group_size}, dtype={self.dtype})"

    def made(self, of, dtype=None):
        """The like of `of(codes)` and `of(scale)`."""
        return QuantShard(of(self.codes), of(self.scale), self.group_size, dtype or self.dtype, self.whole)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in SERVED:
            raise NotImplementedError(
                f"{func} of an INT8 weight that is ready for fully_shard: only its rows are split, copied and gathered; read the "
                "values by the layer's dequantized()"
            )
        return SERVED[func](func, *args, **(kwargs or {}))

    # What torch asks an inner tensor of a parameter for. The form that takes the mesh alone: the other one wants inputs of the
    # weight's own width.

    def fsdp_pre_all_gather(self, mesh):
        piece = -(-self.whole // mesh.size())  # every process sends as many rows, as torch.chunk deals them out

        def padded(rows):
            return rows if len(rows) == piece else torch.cat([rows, rows.new_zeros(piece - len(rows), rows.shape[1])])

        return (padded(self.codes), padded(self.scale)), None

    def fsdp_post_all_gather(self, gathered, metadata, dtype, *, out=None):
        codes, scale = (tensor[: self.whole] for tensor in gathered)
        if out is not None:  # it has these very tensors
            return None
        return QuantShard(codes, scale, self.group_size, dtype, self.whole), ()


def _both(func, x, *args, dtype=None, **kwargs):
    return x.made(lambda tensor: func(tensor, *args, **kwargs), dtype)


def _slice(func, x, dim=0, start=None, end=None, step=1):
    _expect_rows(dim)
    return x.made(lambda tensor: tensor[start:end:step])


def _split(func, x, size, dim=0):
    _expect_rows(dim)
    return [QuantShard(*pair, x.group_size, x.dtype, x.whole) for pair in zip(x.codes.split(size), x.scale.split(size))]


def _expect_rows(dim):
    if dim != 0:
        raise NotImplementedError(f"INT8 weights are sharded by rows, Shard(0), got dimension {dim}")


def _new_zeros(func, x, size, dtype=None, **kwargs):
    """Rows, as fully_shard pads with; with a dtype floats, as anybody else wants them."""
    if dtype is not None or len(size) != 2 or size[1] != x.shape[1]:
        return torch.zeros(size, dtype=dtype or x.dtype, device=x.device)
    return x.made(lambda tensor: tensor.new_zeros(size[0], tensor.shape[1]))


def _new_empty(func, x, size, dtype=None, **kwargs):
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device)


def _zeros_like(func, x, dtype=None, **kwargs):
    """Of floats, as a gradient or a moment is."""
    return torch.zeros(x.shape, dtype=dtype or x.dtype, device=x.device)


def _view(func, x, size, *args):
    if tuple(size) not in (tuple(x.shape), (-1,)):
        raise NotImplementedError(f"an INT8 weight of shape {tuple(x.shape)} cannot be seen as one of shape {tuple(size)}")
    return x.made(lambda tensor: tensor.view(size) if len(size) == 1 else tensor)


def _copy(func, into, source, *args):
    if not isinstance(source, QuantShard) or source.group_size != into.group_size:
        raise NotImplementedError("into rows of INT8 codes such rows alone can be copied: load a state_dict of codes and scales")
    into.codes.copy_(source.codes)
    into.scale.copy_(source.scale)
    return into


SERVED = {
    **dict.fromkeys(
        (aten.detach.default, aten.alias.default, aten.clone.default, aten.empty_like.default, aten._to_copy.default,
         aten._pin_memory.default), _both,
    ),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.new_empty.default: _new_empty,
    aten.zeros_like.default: _zeros_like,
    aten.view.default: _view,
    aten.as_strided.default: _view,
    aten.copy_.default: _copy,
    aten.is_pinned.default: lambda func, x, *args: x.codes.is_pinned(),
}  # fmt: skip


class ShardableLinear(QuantLinear):
    """What `shardable` makes of the class of a QuantLinear: codes and scales are its parameter's, and no buffers.

    Of a sharded weight they are the rows that are here, and a state_dict has them as DTensors, under the same names.
    """

    all_ranks = True  # an expert's runs without tokens too: every process has a gradient of each weight, or averages would part

    @property
    def codes(self):
        return rows_here(self.weight).codes

    @property
    def scale(self):
        return rows_here(self.weight).scale

    @torch.no_grad()
    def quantize_(self, weight):
        if tuple(weight.shape) != tuple(self.weight.shape):
            raise ValueError(f"weight must have shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}")
        self._take(self.coding.encode(_whole(weight).contiguous(), self.group_size))

    @torch.no_grad()
    def dequantized(self, dtype=None):
        """The values of the whole weight (out, in), in `dtype` or the compute dtype. All processes ask for it, or none."""
        codes, scale = (_whole(self._saved(getattr(self, name))) for name in STORED)
        return self.coding.decode(codes, scale, self.in_features, self.group_size, dtype or self.weight.dtype)

    def _take(self, pair):
        """Take codes and scales, of all rows or DTensors."""
        for name, tensor in zip(STORED, pair):
            getattr(self, name).copy_(_rows_of(tensor, self.weight))

    def _saved(self, rows):
        if not _is_dtensor(self.weight):
            return rows
        from torch.distributed.tensor import DTensor

        shape, where = torch.Size((len(self.weight), rows.shape[1])), (self.weight.device_mesh, self.weight.placements)
        return DTensor.from_local(rows, *where, run_check=False, shape=shape, stride=(rows.shape[1], 1))

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with self._without_handle():
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name in STORED:
            destination[prefix + name] = self._saved(getattr(self, name).detach())

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.pop(f"{prefix}weight", None)
        given = {name: state_dict.pop(prefix + name, None) for name in STORED}
        with self._without_handle():
            nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if weight is not None and not is_quantized(weight):
            try:
                self.quantize_(weight)
            except (RuntimeError, ValueError) as error:
                errors.append(f"{prefix}weight: {error}")
            return
        found = len(errors)
        for name, tensor in given.items():
            own = getattr(self, name)
            shape = (len(self.weight), own.shape[1])
            if tensor is None:
                missing.append(prefix + name)
            elif tensor.dtype != own.dtype or tuple(tensor.shape) != shape:
                errors.append(f"{prefix}{name} must be {own.dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}")
        if len(errors) == found and None not in given.values():
            self._take(given.values())


def shardable(model: nn.Module) -> nn.Module:
    """Make the INT8 layers of a model such as torch's fully_shard takes, in place, before it and before an optimizer; return it.

    ValueError for NF4 weights, and for those with a low-rank part.
    """
    layers = [(name, module) for name, module in model.named_modules() if type(module) is QuantLinear]
    for name, module in layers:
        if module.coding != Int8:
            raise ValueError(f"{name}.weight must be in INT8 to be sharded, got {module.coding.name.upper()}")
        if module.part is not None:
            raise ValueError(f"{name}.weight must have no low-rank part to be sharded")
    for _, module in layers:
        weight = module.weight
        settle(weight)
        shard = QuantShard(module.codes, module.scale, module.group_size, weight.dtype, len(weight))
        del module.codes, module.scale
        module.__class__ = ShardableLinear
        module.weight = nn.Parameter(shard, weight.requires_grad)
    return model


def is_shardable(param: torch.Tensor) -> bool:
    """Whether it is a weight of a layer that `shardable` changed, sharded or not."""
    return isinstance(rows_here(param), QuantShard)


def _is_dtensor(value):
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _whole(tensor):
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def _rows_of(tensor, weight):
    """The rows of `tensor`, of all rows or a DTensor, that are here of a weight."""
    if not _is_dtensor(weight):
        return _whole(tensor)
    from torch.distributed.tensor import distribute_tensor

    where = weight.device_mesh, weight.placements
    if _is_dtensor(tensor) and (tensor.device_mesh, tensor.placements) == where:
        return tensor.to_local()
    return distribute_tensor(_whole(tensor).to(rows_here(weight).codes.device), *where, src_data_rank=None).to_local()
