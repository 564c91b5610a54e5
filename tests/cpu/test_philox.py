"""Random bits: the published vectors of Philox 4x32-10, and which bits an element gets."""

import pytest
import torch

from lowrank_sys.reference.philox import philox, random16

# Counter, key and result, from the known-answer tests of Random123.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, want", VECTORS)
def test_published_vectors(counter, key, want):
    words = philox([torch.tensor([c]) for c in counter], key[1] << 32 | key[0])
    assert tuple(int(word) for word in words) == want


def test_an_element_has_its_bits_wherever_the_range_begins():
    whole = random16(0, 100, seed=3, step=5, parameter=7)
    assert torch.equal(random16(37, 63, seed=3, step=5, parameter=7), whole[37:])
    c = [torch.tensor([v]) for v in (0, 0, 5, 7)]
    first = philox(c, 3)[0]
    assert whole[0] == first & 0xFFFF and whole[1] == first >> 16


def test_seed_step_parameter_and_the_high_word_of_the_index_count():
    one = random16(0, 64, seed=1, step=1, parameter=1)
    for other in (
        random16(0, 64, seed=1 << 32 | 1, step=1, parameter=1),
        random16(0, 64, seed=1, step=2, parameter=1),
        random16(0, 64, seed=1, step=1, parameter=2),
        random16(8 << 32, 64, seed=1, step=1, parameter=1),
    ):
        assert not torch.equal(one, other)


def test_bits_are_even():
    bits = random16(0, 1 << 20, seed=11, step=0, parameter=0)
    share = torch.stack([(bits >> i & 1).double().mean() for i in range(16)])
    assert (share - 0.5).abs().max() < 4 * 0.5 / 2**10
