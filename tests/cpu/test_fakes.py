"""What is remembered of operators on fake tensors is what torch works out for them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys.memory import fakes
from lowrank_sys.memory.live import LiveStorages

ops = torch.ops.lowrank


def cases():
    """Name -> function of fp32 (6, 8), bf16 (4, 8, 3), int64 (6)."""
    return {
        "new": lambda a, b, i: [a + 1, a @ a.T, a.new_zeros(3), b.float(), torch.empty_like(b), a.sum(1, dtype=torch.float64)],
        "views": lambda a, b, i: [a.T, a[2:, ::2], a.view(-1), b.expand(2, 4, 8, 3), *a.split(4, 1), *b.unbind(), a.T.reshape(-1)],
        "same or a view": lambda a, b, i: [a.contiguous(), a.T.contiguous(), a.to(torch.float32), a.to(b.dtype), a.flatten()],
        "in place": lambda a, b, i: [a.add_(1), a[1].mul_(2), b.zero_(), *(torch._foreach_mul_([a, a + 1], 2) or [])],
        "lists": lambda a, b, i: [*torch._foreach_norm([a, a.T]), torch.cat([a, a]), torch.stack([i, i])],
        "several": lambda a, b, i: [*torch.sort(a), *torch.linalg.qr(a), *torch.linalg.svd(a, full_matrices=False)],
        "numbers": lambda a, b, i: [i * 2, i * 2.0, i * True, i / 2, *(torch.full((2,), x) for x in (1, 1.0, True))],
        "ours": lambda a, b, i: [*ops.quantize_int8(a, group_size=32), ops.channel_norms(a, left=True)],
    }  # fmt: skip


def described(tensors, given):
    places = {id(t.untyped_storage()): name for name, t in zip("abi", given)}
    return [
        (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.untyped_storage().nbytes(), type(t), t.requires_grad,
         places.get(id(t.untyped_storage())), [t is g for g in given])
        for t in tensors
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(fakes, "_RESULTS", {})


def run(function, remembers):
    with FakeTensorMode() as mode, LiveStorages(fake=mode if remembers else None) as live:
        given = torch.empty(6, 8), torch.empty(4, 8, 3, dtype=torch.bfloat16), torch.arange(6)
        out = described(function(*given), given)
        return out, live.bytes, live.peak, live.most_in_blocks(below=100)


@pytest.mark.parametrize("name", cases())
def test_as_torch(name):
    function = cases()[name]
    want = run(function, remembers=False)
    for _ in range(3):
        assert run(function, remembers=True) == want
    assert fakes._RESULTS


def test_a_default_type_is_part_of_it():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with FakeTensorMode() as mode, LiveStorages(fake=mode):
                assert torch.empty(3).dtype == (torch.arange(3) * 0.5).dtype == dtype
        finally:
            torch.set_default_dtype(before)


def test_known_values_stay_known():
    for value in (3, 4):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, LiveStorages(fake=mode):
            number = torch.tensor(value)
            assert number.item() == value and (number + 1).item() == value + 1


def test_what_cannot_be_done_is_refused_every_time():
    for _ in range(2):
        with FakeTensorMode() as mode, LiveStorages(fake=mode), pytest.raises(RuntimeError):
            torch.empty(3, 4) @ torch.empty(3, 4)


def test_a_composition_takes_the_same_again():
    """The second call is not run, and counts as the first."""
    seen = []
    with FakeTensorMode() as mode:
        for _ in range(3):
            with LiveStorages(fake=mode) as live:
                grad, basis = torch.empty(60, 40), torch.empty(40, 8)
                new = ops.subspace_iteration(grad, basis, rank=8, left=False, n_iter=1, seed=len(seen))
                seen.append((live.bytes, live.peak, live.now(), live.most_in_blocks(below=3000), [t.shape for t in new]))
    assert seen[0] == seen[1] == seen[2]
