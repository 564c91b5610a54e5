"""NF4 beside bitsandbytes on the CPU: the same bytes and the same values, where its blocks are ours: rows of whole groups."""

import pytest
import torch

functional = pytest.importorskip("bitsandbytes", reason="the peer bitsandbytes is not installed").functional

ops = torch.ops.lowrank


def weights(dtype):
    """Normal values, a group of zeros, outliers, and the largest values of both signs."""
    w = 0.02 * torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
    w[3, 64:128], w[4, 5], w[5, 7], w[6] = 0.0, 3.0, -3.0, w[6].abs()
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_codes_absmax_and_values_are_those_of_the_peer(group_size, dtype):
    w = weights(dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=group_size, quant_type="nf4")
    packed, absmax = ops.quantize_nf4(w, group_size=group_size)
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    ours = ops.dequantize_nf4(packed, absmax, n=512, group_size=group_size, dtype=dtype)
    assert torch.equal(ours, functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_at_the_midpoints(shift):
    """Of two levels that are equally near both take the lower one; one unit in the last place beside them, the nearer."""
    levels = torch.tensor(functional.get_4bit_type("nf4", device="cpu").tolist())
    middle = (levels[1:] + levels[:-1]) / 2
    row = torch.zeros(1, 64)
    row[0, 0], row[0, 1:16] = 1.0, torch.nextafter(middle, middle + shift)
    theirs, _ = functional.quantize_4bit(row, blocksize=64, quant_type="nf4")
    packed, _ = ops.quantize_nf4(row)
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert (torch.stack((packed >> 4, packed & 15), 2).flatten()[1:16] - torch.arange(15) == (1 if shift > 0 else 0)).all()


def test_their_layer_computes_what_ours_does():
    """Linear4bit on the CPU, within what fp32 sums may be off by."""
    from bitsandbytes.nn import Linear4bit

    w, x = weights(torch.float32), torch.randn(9, 512, generator=torch.Generator().manual_seed(1))
    layer = Linear4bit(512, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
    layer.load_state_dict({"weight": w})
    theirs = layer.to("cpu")(x)
    assert layer.weight.dtype == torch.uint8
    torch.testing.assert_close(ops.nf4_linear(x, *ops.quantize_nf4(w)), theirs, rtol=1e-5, atol=1e-6)
