"""QuantExperts: experts stacked in one parameter, kept in INT8 or NF4, each dequantized inside its own product."""

import functools

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lowrank_sys.nn.projected_linear import ProjectedLinear
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.unused import expect_unused_found

# Name of the child module that holds the layers of a module's stacks.
LAYERS = "quant_experts"


class QuantExperts(nn.Module):
    """What `quantize_model` adds to the class of a module of experts that transformers' use_experts_implementation knows.

    A stack (E, out, in), with `is_transposed` (E, in, out), is E layers QuantLinear (out, in) in `quant_experts`, whose weights are
    parameters as any quantized weight, `quant_experts.gate_up_proj.0.weight`. Tokens go to them sorted by expert; an expert without
    tokens gets no gradient. The sizes of the parts are read on the host, as in the module's own loop. A state_dict with a float
    stack is quantized as it is loaded.
    """

    base = nn.Module  # the module's class without it
    skips_experts = True

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states (tokens, d), top_k_index and top_k_weights (tokens, k) -> (tokens, d)."""
        if isinstance(self.quant_experts["down_proj"][0], ProjectedLinear):
            expect_unused_found(self)
        tokens, k = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort()
        sizes = _sizes(expert, len(self.quant_experts["down_proj"]))
        y = self._product(_first(self), hidden_states[order // k], expert, sizes)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._product("down_proj", y, expert, sizes)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order, None]
        return y[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _product(self, name, x, expert, sizes):
        parts = zip(self.quant_experts[name], x.split(sizes), strict=True)
        y = torch.cat([layer(part) for layer, part in parts if len(part) or getattr(layer, "all_ranks", False)])
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    @torch.no_grad()
    def quantize_(self, name, stack):
        """Take the values of a float stack, of the shape that it had."""
        layers = self.quant_experts[name]
        if stack.dim() != 3 or len(stack) != len(layers):
            raise ValueError(f"{name} must be {len(layers)} matrices, got {tuple(stack.shape)}")
        for layer, matrix in zip(layers, _matrices(self, stack)):
            layer.quantize_(matrix)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in self.quant_experts:
            stack = state_dict.pop(prefix + name, None)
            for e, matrix in enumerate([] if stack is None else _matrices(self, stack)):
                state_dict[f"{prefix}{LAYERS}.{name}.{e}.weight"] = matrix
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol):
        return _empty, (self.base,), self.__dict__.copy()


def _sizes(expert, count):
    """How many tokens each expert has. Of fake tensors nobody knows: an equal share each."""
    if isinstance(expert, FakeTensor):
        return [len(part) for part in expert.tensor_split(count)]
    return torch.bincount(expert, minlength=count).tolist()


def _first(module):
    return "gate_up_proj" if module.has_gate else "up_proj"


def _matrices(module, stack):
    return (stack.transpose(1, 2) if module.is_transposed else stack).unbind()


@functools.cache
def _class_of(base):
    return type(f"Quant{base.__name__}", (QuantExperts, base), {"base": base, "__doc__": QuantExperts.__doc__})


def _empty(base):
    return object.__new__(_class_of(base))


def stacks_of(module):
    """The names of the stacks of a module of experts that can be quantized, () if it is none."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return ()
    names = (_first(module), "down_proj")
    stacked = all(isinstance(stack := module._parameters.get(name), nn.Parameter) and stack.dim() == 3 for name in names)
    return names if stacked else ()


@torch.no_grad()
def convert_experts(module, group_size=None, weights="int8"):
    """Make a module of experts a QuantExperts, in place. Values are rounded to the nearest code."""
    holder = nn.ModuleDict()
    for name in stacks_of(module):
        stack = module._parameters.pop(name)
        layers = [QuantLinear.from_weight(matrix, group_size, weights) for matrix in _matrices(module, stack)]
        for layer in layers:
            layer.weight.requires_grad_(stack.requires_grad)
        holder[name] = nn.ModuleList(layers)
    module.add_module(LAYERS, holder.train(module.training))
    module.__class__ = _class_of(type(module))


@torch.no_grad()
def revert_experts(module):
    """The inverse: float stacks with the values of the codes."""
    for name, layers in module.quant_experts.items():
        matrices = [layer.dequantized() for layer in layers]
        stack = torch.stack([matrix.T for matrix in matrices] if module.is_transposed else matrices)
        module.register_parameter(name, nn.Parameter(stack, any(layer.weight.requires_grad for layer in layers)))
    delattr(module, LAYERS)
    module.__class__ = module.base
