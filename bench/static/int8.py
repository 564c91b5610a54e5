"""The linear layer on INT8 and NF4 weights."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.int8_linear import int8_linear_kernel

SMALLEST, INT8, NF4 = 32, 256, 64  # groups: the smallest, and the usual ones
WAYS = [f"{way}{split}{nf4}" for nf4 in ("", "+nf4") for split in ("", "+split") for way in ("forward", "back")]


def calls(kind):
    if kind == "odd":  # the smallest group cuts the tile
        return [((dtype,), f"{way}+small") for dtype in FLOATS for way in WAYS]
    return [((dtype,), way) for dtype in ({16: ("bf16", "fp16"), 32: ("fp32",)}[kind]) for way in WAYS]


def always(kind, tokens):
    if kind == 16 and tokens < 128:
        return [(("bf16",), "forward+split")]
    if kind == 16:
        # Forward NF4 takes more registers than INT8, back fewer; wgmma's tile depends on how it is fed.
        fed = [(("fp16",), "back+split+nf4")] if tokens > 128 else []
        return [(("bf16",), "forward+nf4"), (("fp16",), "back+split"), *fed]
    return [(("fp32",), "forward")] if kind == 32 else []


def tensors(types, variant):
    codes = "*u8" if "nf4" in variant else "*i8"
    pointers = {"rows": f"*{types[0]}", "codes": codes, "scale": "*fp32", "out": f"*{types[0]}", "t": "i32"}
    pointers |= {"partials": "*fp32", "counters": "*i32"} if "split" in variant else {}
    return pointers | ({} if "back" in variant else {"bias": "*fp32"})


def constants(variant, config):
    back, nf4 = "back" in variant, "nf4" in variant
    group = SMALLEST if "small" in variant else NF4 if nf4 else INT8
    tile = configs.int8_linear_tile(config, back=back, group_size=group, nf4=nf4)
    return {"BACK": back, "NF4": nf4, "GROUP": group, **tile}


def rows(arch):
    table = configs.of_arch(configs.INT8_LINEAR, arch)
    return {(kind, tokens): config for kind, by_tokens in table.items() for tokens, config in by_tokens.items()}


KERNELS = {
    "int8_linear": Kernel(
        int8_linear_kernel,
        rows,
        calls,
        tensors,
        always=always,
        constants=constants,
        limit="t",
        sizes={16: ("aligned",), 32: ("aligned",), "odd": ("odd",)},
    )
}
