"""The values that 8-bit codes stand for."""

import torch


def _fp32(value):
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _map(signed):
    magnitudes = []
    for decade in range(7):
        parts = (1 if signed else 2) << decade
        # Each boundary is rounded to fp32 once: the products below are exact in fp64.
        i, step = torch.arange(parts + 1, dtype=torch.float64, device="cpu"), ((_fp32(1.0) - 0.1) / parts).double()
        boundaries = torch.where(i < (parts + 1) // 2, _fp32(0.1).double() + step * i, 1 - step * (parts - i)).float()
        magnitudes.append((boundaries[1:] + boundaries[:-1]) / 2 * 10.0 ** (decade - 6))
    magnitudes = torch.cat(magnitudes)
    return torch.cat([*((-magnitudes.flip(0),) if signed else ()), _fp32(0.0)[None], magnitudes, _fp32(1.0)[None]])


# Numbers, not tensors: one made while tensors are fake would stay so.
_VALUES = {signed: _map(signed).tolist() for signed in (True, False)}


def dynamic_map(signed, device="cpu"):
    """The 256 values of codes, ascending, fp32: dynamic tree quantization.

    [0.1, 1) * 10^(i-6), i = 0 ... 6, holds the midpoints of 2^i equal parts with both signs (unsigned: of 2^(i+1)); also 0
    and 1. Sums and products are rounded as those of bitsandbytes.functional.create_dynamic_map, which it equals.
    """
    return torch.tensor(_VALUES[signed], dtype=torch.float32, device=device)
