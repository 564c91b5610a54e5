"""Weight stores: how an optimizer keeps and writes the weights. A parameter says by itself which store it has."""

import torch

from lowrank_sys._ops import FLOATS
from lowrank_sys.nn.quant_weight import drop_exact, is_quantized


def by_rows(params):
    """The weights as ops write them: one whose memory is laid out otherwise (channels_last, a transpose) as a copy in rows."""
    return [param if param.is_contiguous() else param.contiguous() for param in params]


def put_back(params, written):
    """Give the weights that `by_rows` copied their new values."""
    for param, values in zip(params, written):
        if values is not param:
            param.copy_(values)


class InPlace:
    """The parameter itself, in its own dtype (fp32, bf16 or fp16), rounded to nearest even once a step."""

    int8 = False
    group_size = None

    def check(self, param, name):
        """Raise a ValueError that names a weight that cannot be kept so."""
        if param.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")

    def init(self, state, index):
        """Add this store's state for matrix `index` of the optimizer."""

    def tensors(self, params):
        """The lists of tensors that ops take for the weights."""
        return (params,)

    def options(self, group, states):
        """The arguments of the ops that belong to the weights."""
        return {}


class Int8(InPlace):
    """INT8 codes and their scales (lowrank_sys.nn.QuantWeight), rounded stochastically once a step.

    The random bits follow from the group's `seed`, the step and the number of the matrix: a resumed run draws the same.
    State of a matrix: `parameter`, its number.
    """

    int8 = True

    def __init__(self, group_size):
        self.group_size = group_size

    def check(self, param, name):
        """Codes and scales are what quantize_int8 made."""

    def init(self, state, index):
        state["parameter"] = index

    def tensors(self, params):
        drop_exact(*params)
        return [p.codes for p in params], [p.scale for p in params]

    def options(self, group, states):
        return {"seed": group["seed"], "parameters": [s["parameter"] for s in states], "group_size": self.group_size}

    def in_full(self, step, group, params, gradients, states, *rest):
        """Take a step that writes float weights only: on fp32 values of one matrix at a time, whose change is rounded.

        Two fp32 copies of that matrix exist meanwhile.
        """
        size = self.group_size
        drop_exact(*params)
        for param, gradient, state in zip(params, gradients, states):
            before = torch.ops.lowrank.dequantize_int8(param.codes, param.scale, group_size=size)
            after = before.clone()
            step(group, [after], [gradient], [state], *rest)
            one = after.new_ones(())
            torch.ops.lowrank.int8_update_(
                param.codes,
                param.scale,
                after.sub_(before),
                alpha=one,
                decay=one,
                seed=group["seed"],
                step=state["step"],
                parameter=state["parameter"],
                group_size=size,
            )


IN_PLACE = InPlace()


def weight_store(param):
    """The store that a parameter is kept in."""
    return Int8(param.group_size) if is_quantized(param) else IN_PLACE
