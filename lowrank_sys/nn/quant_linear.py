"""QuantLinear: a linear layer on an INT8 or NF4 weight."""

import contextlib
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowrank_sys._ops import FLOATS
from lowrank_sys._ops.rules import expect_group_size
from lowrank_sys.nn.codings import coding_of
from lowrank_sys.nn.low_rank_part import NAMES, check_part, drop_part, part_of
from lowrank_sys.nn.quant_weight import QuantWeight, drop_exact, settle, zero


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, W with its low-rank part. One node, so that dx is there before a hook on W's gradient can write the codes."""

    @staticmethod
    def forward(ctx, x, weight, codes, scale, bias, group_size, coding, part):
        factor = None if part is None else part.factor  # whoever writes it before backward is told
        ctx.save_for_backward(x if weight.requires_grad else None, codes, scale, factor)
        ctx.group_size, ctx.coding, ctx.part, ctx.columns = group_size, coding, part, weight.shape[1]
        ctx.dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = coding.linear(x, codes, scale, bias, group_size)
        return y if part is None else y.add_(part.times(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, codes, scale, _ = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        rows = grad_out.reshape(-1, codes.shape[0])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = ctx.coding.linear_backward(grad_out, codes, scale, ctx.columns, ctx.group_size)
            dx = dx if ctx.part is None else dx.add_(ctx.part.times(grad_out, back=True))
        if ctx.needs_input_grad[1]:
            dw = (rows.T @ x.reshape(-1, ctx.columns)).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            db = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, None, None, db, None, None, None


class QuantLinear(nn.Module):
    """y = x Wᵀ + b with W in INT8 or NF4: dequantized tile by tile inside the product, and again in backward.

    `weight` is a QuantWeight: a parameter without values whose `.grad` is the ordinary full gradient (out, in), made only if
    the weight requires one. Its values are the buffers `codes` (out, in) int8, in NF4 (out, ⌈in/2⌉) uint8, and `scale`
    (out, ⌈in/group_size⌉) fp32: these are what state_dict() has in place of `weight`, and the buffers of the low-rank part that
    LoQT trains. `.to()`, `.half()` and the like change the type of `weight` and `bias`, that of buffers stays. A state_dict with a
    float `weight` is quantized as it is loaded. Under autocast x is cast as for nn.Linear. Differentiable once.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear, and the same initialisation, quantized.
        group_size: neighbours along in_features that share a scale; a power of two from 32 to 1024. None: 256, in NF4 64.
        weights: 'int8' or 'nf4'.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, group_size: int | None = None, weights: str = "int8",
    ) -> None:  # fmt: skip
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.coding = coding_of(weights)
        group_size = check_quantizable(dtype, group_size, weights)
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        of_codes, of_scale = self.coding.shapes(out_features, in_features, group_size)
        self.register_buffer("codes", torch.empty(of_codes, dtype=self.coding.dtype, device=device))
        self.register_buffer("scale", torch.empty(of_scale, dtype=torch.float32, device=device))
        self.weight = self._handle(dtype)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw weight and bias as nn.Linear does."""
        if self.codes.is_meta:
            return
        weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=self.codes.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.quantize_(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.in_features))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear, group_size=None, weights="int8"):
        """A layer with the values of `linear` (nn.Linear), rounded to nearest, and its own bias parameter."""
        made = cls.from_weight(linear.weight, group_size, weights)
        made.weight.requires_grad_(linear.weight.requires_grad)
        made.bias = linear.bias
        return made.train(linear.training)

    @classmethod
    def from_weight(cls, weight, group_size=None, weights="int8"):
        """A layer without bias that has the values of `weight` (out, in), rounded to nearest."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], False, dtype=weight.dtype, group_size=group_size, weights=weights)
        made.quantize_(weight.detach())
        return made

    @torch.no_grad()
    def quantize_(self, weight):
        """Take the values of `weight` (out, in), fp32 | bf16 | fp16, rounded to the nearest codes, on its device."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"weight must have shape {(self.out_features, self.in_features)}, got {tuple(weight.shape)}")
        self.codes, self.scale = self.coding.encode(weight.contiguous(), self.group_size)
        drop_part(self._buffers)
        drop_exact(self.weight)
        self.follow()

    @torch.no_grad()
    def dequantized(self, dtype=None):
        """The weight's values (out, in), in `dtype` or the compute dtype."""
        settle(self.weight)
        dtype, part = dtype or self.weight.dtype, self.part
        own = self.coding.decode(self.codes, self.scale, self.in_features, self.group_size, dtype if part is None else None)
        if part is not None:
            part.add_to(own)
        return own.to(dtype)

    def forward(self, x):
        settle(self.weight)
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tensors = (self.weight, self.codes, self.scale, self.bias)
        return _Linear.apply(x.contiguous(), *tensors, self.group_size, self.coding, self.part)

    def extra_repr(self):
        bias = self.bias is not None
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, group_size={self.group_size}"
        return sizes if self.coding.name == "int8" else f"{sizes}, weights={self.coding.name}"

    @property
    def part(self):
        """The low-rank part of the weight, or None."""
        return part_of(self._buffers, (self.out_features, self.in_features))

    def _handle(self, dtype, requires_grad=True):
        return QuantWeight.over(self._buffers, self.group_size, dtype, requires_grad, self.coding, self.in_features)

    @contextlib.contextmanager
    def _without_handle(self):
        """nn.Module passes over a parameter that is None, and keeps its place."""
        weight, self._parameters["weight"] = self._parameters["weight"], None
        try:
            yield weight
        finally:
            self._parameters["weight"] = weight

    def follow(self, dtype=None):
        """Make the handle one of the buffers' device, and of `dtype`: the same parameter where torch can."""
        weight = self.weight
        dtype = dtype or weight.dtype
        handle = zero(weight.shape, dtype, self.codes.device)
        if type(weight) is QuantWeight and torch._has_compatible_shallow_copy_type(weight, handle):
            with torch._C.DisableTorchFunctionSubclass():
                weight.data = handle
        else:
            grad = weight.grad
            self.weight = self._handle(dtype, weight.requires_grad)
            if grad is not None and grad.device == self.codes.device:
                self.weight.grad = grad

    def _apply(self, fn, recurse=True):
        def keep(tensor):
            moved = fn(tensor)
            stored = any(tensor is buffer for buffer in self._buffers.values())
            return tensor.to(moved.device) if stored and moved.dtype != tensor.dtype else moved

        settle(self.weight)
        drop_exact(self.weight)
        with self._without_handle() as weight:
            super()._apply(keep, recurse)
        grad, weight.grad = weight.grad, None
        self.follow(fn(torch.zeros((), dtype=weight.dtype, device=weight.device)).dtype)
        if grad is not None:
            self.weight.grad = fn(grad)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        settle(self.weight)
        with self._without_handle():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None:
            try:
                pair = self.coding.encode(dense.contiguous(), self.group_size)
            except RuntimeError as error:
                errors.append(f"{prefix}weight: {error}")
                pair = self.codes, self.scale
            state_dict[prefix + "codes"], state_dict[prefix + "scale"] = pair
        for name in ("codes", "scale"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and given.dtype != own.dtype:
                errors.append(f"{prefix}{name} must be {own.dtype}, got {given.dtype}")
                state_dict[prefix + name] = own
        if prefix + "codes" in state_dict:  # with it comes its part, or none
            drop_part(self._buffers)
        for name in NAMES:
            if prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(state_dict[prefix + name], device=self.codes.device)
        with self._without_handle():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        try:
            check_part(self._buffers, (self.out_features, self.in_features))
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
            drop_part(self._buffers)
        drop_exact(self.weight)
        self.follow()  # assign=True may have brought buffers of another device


def check_quantizable(dtype, group_size, weights="int8", name="weight"):
    """The size of a group, by default the coding's own; a ValueError for what cannot become a quantized weight."""
    coding = coding_of(weights)
    group_size = coding.group_size if group_size is None else group_size
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    if not isinstance(group_size, int):
        raise ValueError(f"group_size must be a power of two from 32 to 1024, got {group_size!r}")
    try:
        expect_group_size("quantize", group_size)
    except RuntimeError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return group_size
