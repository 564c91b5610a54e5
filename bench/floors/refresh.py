"""Promises of the basis' refresh."""

import functools
import itertools

import torch

from lowrank_sys.bench import kernels, timing
from lowrank_sys.bench.cases import make
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import RANK, SIZE, Floor
from lowrank_sys.subspace.select import randomized_basis
from lowrank_sys.train import data, models


def _refresh_case(rank):
    return Case("subspace_iteration", SIZE, SIZE, rank, torch.float32, False, "cpu")


@functools.cache
def _svd_seconds(timer):
    grad = make(_refresh_case(RANK))["grad"]
    return timer(lambda: torch.linalg.svd(grad, full_matrices=False))


def refresh(timer, rank):
    """Time of an SVD, as galore-torch takes it, over that of a warm refresh."""
    t = make(_refresh_case(rank))

    def run():
        randomized_basis(t["grad"], t["basis"], rank=rank, left=False)

    return _svd_seconds(timer) / timing.quantile(timer.interleave({"refresh": run}, seconds=3, at_least=5)["refresh"], 0.5)


def energy(timer, ranks=(8, 32, RANK), batch=8, seq_len=128, gap=10, refreshes=2):
    """Least energy, over the weights of a llama-9m in training, that a refreshed basis has of the best of its rank.

    Trains on the Python library's bytes, at least 8 tokens a step for each direction of the largest rank; small ranks are
    there because these gradients have little energy beyond their first 32 directions. Every `gap` steps the gradients are
    recorded: the first choose the bases, the later ones refresh them from where they are.
    """
    torch.manual_seed(0)
    model = models.build(models.config("llama-9m", seq_len=seq_len), dtype=torch.float32, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = b"".join(itertools.islice(data.read(data.STDLIB), 100))
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    weights = [(name, p) for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    bases, shares = {}, []
    for step in range(gap * refreshes + 1):
        starts = torch.randint(len(stream) - seq_len, (batch,)).tolist()
        tokens = torch.stack([stream[i : i + seq_len] for i in starts])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, weight in weights if step % gap == 0 else ():
            grad, left, energies = weight.grad, weight.shape[0] < weight.shape[1], kernels.energies(weight.grad)
            for rank in ranks:
                old = bases.get((name, rank))
                basis, _ = randomized_basis(grad, old, rank=rank, left=left)
                bases[name, rank] = basis
                if step:
                    shares.append(kernels.captured(grad, basis, left) / energies[:rank].sum().item())
        optimizer.step()
    return min(shares)


FLOORS = [
    Floor(
        f"refresh against SVD, {SIZE}x{SIZE}, r = {RANK}",
        ">= 100x faster",
        100.0,
        functools.partial(refresh, rank=RANK),
        True,
        "{:.0f}x",
    ),
    Floor(
        f"refresh against SVD, {SIZE}x{SIZE}, r = 1024",
        ">= 30x faster",
        30.0,
        functools.partial(refresh, rank=1024),
        True,
        "{:.0f}x",
    ),
    Floor(
        "energy of a refreshed basis of the best, r = 8, 32, 128, gradients of a llama-9m",
        ">= 99%",
        0.99,
        energy,
        True,
        "{:.2%}",
        speed=False,
    ),
]
