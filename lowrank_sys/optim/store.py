"""Weight stores: how an optimizer keeps and writes the weights."""

from lowrank_sys._ops import FLOATS


class InPlace:
    """The parameter itself, in its own dtype (fp32, bf16 or fp16), rounded to nearest even once a step."""

    def check(self, group, names):
        """Raise a ValueError that names the weight that cannot be kept so."""
        for name, param in zip(names, group["params"]):
            if param.dtype not in FLOATS:
                raise ValueError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")
            if not param.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {param.stride()}")
