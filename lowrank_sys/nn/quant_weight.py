"""QuantWeight: the parameter that stands for an INT8 or NF4 weight."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lowrank_sys.nn.codings import Int8
from lowrank_sys.nn.low_rank_part import NAMES, drop_part, part_of

# What torch asks the handle itself: about its kind, its gradient and its hooks.
ABOUT = {
    *("dim", "ndimension", "size", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device", "data_ptr"),
    *("__len__", "__hash__", "__set__", "__delete__", "untyped_storage", "requires_grad_", "retain_grad", "new"),
    "_has_compatible_shallow_copy_type",
}
# What writes into a tensor and has no name that ends in one "_".
IN_PLACE_OPERATORS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}


def writes(func):
    """Whether a function of torch's writes into its first argument."""
    name = func.__name__
    return name in IN_PLACE_OPERATORS or name.endswith("_") and not name.endswith("__")


def zero(shape, dtype, device):
    """One zero, expanded: it takes no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


class QuantWeight(nn.Parameter):
    """A parameter that looks like a weight (out, in) in its compute dtype, whose values are INT8 or NF4 codes and their
    scales, and a low-rank part where an optimizer gave it one (lowrank_sys.nn.low_rank_part).

    The parameter itself is a single zero, expanded, and takes no memory: what has values are `codes` and `scale`. Its `.grad`
    is the ordinary full gradient, so hooks, clipping, names and an optimizer's state are those of any weight.

    What reads it gets the values of the codes, in its dtype. What writes into it as a whole (an average of models, above all) is
    computed in fp32 and rounded to the nearest codes. The fp32 values stay with the handle, and count in the next such read or
    write, until the weight is trained, loaded, moved or copied: by codes alone, an average in small steps would never move.
    A view of it cannot be written: RuntimeError.

    Args:
        codes: (out, in) int8.
        scale: (out, ⌈in/group_size⌉) fp32, as torch.ops.lowrank.quantize_int8 makes them.
        group_size: neighbours of a row that share a scale. coding: lowrank_sys.nn.codings. columns: `in`, where it does not follow
            from the codes' shape.
        dtype: of the weight as it looks, and of its gradient: fp32, bf16 or fp16.
        requires_grad: False for a frozen weight.
    """

    def __new__(cls, codes, scale, *, group_size=256, dtype=torch.float32, requires_grad=True, coding=Int8, columns=None):
        return cls.over({"codes": codes, "scale": scale}, group_size, dtype, requires_grad, coding, columns)

    @classmethod
    def over(cls, tensors, group_size, dtype, requires_grad=True, coding=Int8, columns=None):
        """A handle that reads `codes` and `scale` from the dict `tensors`: a layer's own buffers, whatever replaces them."""
        codes = tensors["codes"]
        shape = (codes.shape[0], codes.shape[1] if columns is None else columns)
        made = super().__new__(cls, zero(shape, dtype, codes.device), requires_grad)
        made.group_size, made.coding, made._tensors = group_size, coding, tensors
        if type(made) is cls:
            made._exact = {}
        else:  # a parameter made of a fake tensor stays one
            made._is_quantized = True
            made.codes, made.scale = tensors["codes"], tensors["scale"]
        return made

    @property
    def codes(self):
        return self._tensors["codes"]

    @property
    def scale(self):
        return self._tensors["scale"]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not args:  # torch.nn.init names its one
            args = (kwargs.pop(next(iter(kwargs))),)
        if func == torch.Tensor.data.__set__:
            func = torch.Tensor.copy_
        name, first = func.__name__, args[0]
        if func == torch.Tensor.detach or func == torch.Tensor.data.__get__:
            return first._alias()
        if writes(func) and name not in ABOUT:
            with torch.no_grad():
                return _write(func, first, args[1:], kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if name in ABOUT or name.startswith(("is_", "_is_", "new_", "register_")) or name.endswith("_like"):
                return func(*args, **kwargs)
            if name in ("__get__", "to"):
                made = func(*args, **kwargs)
                if made is first or name == "__get__" and not _is_view(made, first):
                    return made
            read = []
            args, kwargs = tree_map_only(cls, lambda handle: read.append(handle._read()) or read[-1], (args, kwargs))
            return _views_of(read, func(*args, **kwargs))

    def _like(self):
        """The arguments of `over` beside the tensors."""
        return self.group_size, self.dtype, self.requires_grad, self.coding, self.shape[1]

    def _alias(self):
        made = type(self).over(self._tensors, *self._like()).requires_grad_(False)
        made._exact = self._exact
        return made

    def _stamp(self):
        return [(id(tensor), tensor._version) for tensor in (self.codes, self.scale)]

    def _values(self):
        """In fp32, as they were last written; a tensor of its own."""
        if self._exact:
            return self._exact["values"].clone()
        return decoded(self)

    def _read(self):
        values = self._values().to(self.dtype)
        return values + self if torch.is_grad_enabled() and self.requires_grad else values  # the gradient goes to the handle

    def _take(self, values):
        codes, scale = self.coding.encode(values, self.group_size)
        drop_part(self._tensors)
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        self._exact.update(values=values, version=self._stamp())

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            settle(self)
            tensors = copy.deepcopy(self._tensors, memo)  # shared with the layer by way of the memo
            memo[id(self)] = type(self).over(tensors, *self._like())
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        settle(self)
        return QuantWeight.over, (self._tensors, *self._like())

    def __repr__(self):
        return f"QuantWeight({tuple(self.shape)}, group_size={self.group_size}, dtype={self.dtype}, device={self.device})"


def settle(weight):
    """Make the codes those of the values that were last written: AveragedModel copies the model's buffers over an average's."""
    if type(weight) is QuantWeight and weight._exact and weight._exact["version"] != weight._stamp():
        with torch.no_grad():
            weight._take(weight._exact["values"])


def drop_exact(*weights):
    """The codes alone count from here on."""
    for weight in weights:
        if type(weight) is QuantWeight:
            weight._exact.clear()


class _ReadOnly(torch.Tensor):
    """A view of values that were read."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        first = args[0] if args else next(iter(kwargs.values()))
        if writes(func) and isinstance(first, cls):
            raise RuntimeError(f"{func.__name__}: a view of a quantized weight cannot be written: write into the weight as a whole")
        with torch._C.DisableTorchFunctionSubclass():
            return _views_of([arg for arg in args if isinstance(arg, cls)], func(*args, **(kwargs or {})))

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def _views_of(read, made):
    """What a function made of values that were read, its views of them as such."""
    return tree_map_only(
        torch.Tensor, lambda t: t.as_subclass(_ReadOnly) if any(_is_view(t, values) for values in read) else t, made
    )


def _is_view(made, of):
    return (
        isinstance(made, torch.Tensor)
        and made.layout == torch.strided
        and made.untyped_storage()._cdata == of.untyped_storage()._cdata
    )


def _write(func, into, others, kwargs):
    """Call `func`, which writes into a tensor or into each of a list; the values of one quantized weight at a time are in fp32."""
    if isinstance(into, (list, tuple)):
        _write_each(func, into, others, kwargs)
    elif not isinstance(into, QuantWeight):
        func(into, *tree_map_only(QuantWeight, QuantWeight._read, others), **tree_map_only(QuantWeight, QuantWeight._read, kwargs))
    elif func == torch.Tensor.copy_ and _alike(into, *others[:1]):
        settle(others[0])
        into.codes.copy_(others[0].codes)
        into.scale.copy_(others[0].scale)
        drop_exact(into)
    else:
        values = into._values()
        func(values, *tree_map_only(torch.Tensor, _in_fp32, others), **tree_map_only(torch.Tensor, _in_fp32, kwargs))
        into._take(values)
    return into


def _alike(into, source=None):
    if not isinstance(source, QuantWeight) or part_tensors(into) or part_tensors(source):
        return False
    return (source.shape, source.group_size, source.coding) == (into.shape, into.group_size, into.coding)


def _write_each(func, into, others, kwargs):
    """Of torch._foreach_*: lists of one length, and what belongs to all."""
    quantized = [i for i, tensor in enumerate(into) if isinstance(tensor, QuantWeight)]
    plain = [i for i in range(len(into)) if i not in quantized]
    if plain:
        others_of = [tree_map_only(QuantWeight, QuantWeight._read, _pick(arg, plain, len(into))) for arg in others]
        func([into[i] for i in plain], *others_of, **kwargs)
    for i in quantized:
        values = into[i]._values()
        func([values], *tree_map_only(torch.Tensor, _in_fp32, [_pick(arg, [i], len(into)) for arg in others]), **kwargs)
        into[i]._take(values)


def _pick(arg, chosen, length):
    return [arg[i] for i in chosen] if isinstance(arg, (list, tuple)) and len(arg) == length else arg


def _in_fp32(tensor):
    if isinstance(tensor, QuantWeight):
        return tensor._values()
    return tensor.float() if tensor.is_floating_point() else tensor


def rows_here(param):
    """The handle of the rows that are here: of a DTensor the tensor inside."""
    return getattr(param, "_local_tensor", param)


def is_quantized(param: torch.Tensor) -> bool:
    """Whether `param` is the handle of an INT8 or NF4 weight, sharded or not."""
    return type(param) is QuantWeight or getattr(rows_here(param), "_is_quantized", False)


def buffers_of(weight):
    """The dict of its layer's buffers, in which a quantized weight's codes, scales and low-rank part are."""
    return rows_here(weight)._tensors


def low_rank_part(weight):
    """The low-rank part of a quantized weight, or None."""
    return part_of(buffers_of(weight), weight.shape)


def part_tensors(weight):
    """What a quantized weight holds beside codes and scales."""
    tensors = buffers_of(weight)
    return [tensors[name] for name in NAMES if tensors.get(name) is not None]


def decoded(weight):
    """The values of a quantized weight (out, in), its low-rank part with them, fp32."""
    values = weight.coding.decode(weight.codes, weight.scale, weight.shape[1], weight.group_size, torch.float32)
    part = low_rank_part(weight)
    if part is not None:
        part.add_to(values)
    return values


def tensors_of(weight):
    """What has the values of a weight, quantized or not."""
    if not is_quantized(weight):
        return [weight.data]
    rows = rows_here(weight)
    return [rows.codes, rows.scale, *part_tensors(weight)]


def names_of(name):
    """The handle of this name, and its layer's buffers that have its values, or will."""
    prefix = name[: name.rfind(".") + 1]
    return [name, *(f"{prefix}{buffer}" for buffer in ("codes", "scale", *NAMES))]
