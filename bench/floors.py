"""`lowrank bench floors`: what this package promises of its speed on a CPU, measured; exit 1 on a miss."""

import functools
import itertools
from typing import Callable, NamedTuple

import torch

from lowrank_sys.bench import kernels, machine, optimizers, report, shapes, timing
from lowrank_sys.bench.cases import Case, make
from lowrank_sys.cli import CommandError
from lowrank_sys.subspace.refresh import randomized_basis
from lowrank_sys.train import data, models

SIZE, RANK = 4096, 128
CEILINGS = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}  # rooflines are not part of a floor


class Floor(NamedTuple):
    what: str
    promise: str
    limit: float
    measure: Callable  # timer -> the figure
    at_least: bool  # whether the figure must be at least the limit, or at most
    form: str = "{:.2f}x"

    def holds(self, figure):
        return figure >= self.limit if self.at_least else figure <= self.limit


def galore_step(timer):
    """Time of galore_step over that of its two bare GEMMs, on the worse side."""
    ratios = []
    for left in (True, False):
        case = Case("galore_step", SIZE, SIZE, RANK, torch.float32, left, "cpu")
        served = kernels.measure(case, timer, CEILINGS, seconds=5)[0]
        if served["check"] != "ok":
            raise CommandError(f"galore_step, served by {served['variant']}: {served['check']}", code=1)
        ratios.append(served["ratio"])
    return max(ratios)


def steady_step(timer):
    """Time of galore-torch's steady step over ours."""
    settings = optimizers.Settings([(SIZE, SIZE)], RANK, torch.float32, optimizers.NEVER, "cpu")
    ours, _ = optimizers.measure(settings, ("lowrank", "galore-torch"), timer, base="galore-torch", steps=30, svd=False)
    return 1 / ours["ratio"]


@functools.cache
def _svd_seconds(timer):
    grad = make(_refresh_case(RANK))["grad"]
    return timer(lambda: torch.linalg.svd(grad, full_matrices=False))


def _refresh_case(rank):
    return Case("subspace_iteration", SIZE, SIZE, rank, torch.float32, False, "cpu")


def refresh(timer, rank):
    """Time of an SVD, as galore-torch takes it, over that of a warm refresh."""
    t = make(_refresh_case(rank))

    def run():
        randomized_basis(t["grad"], t["basis"], rank=rank, left=False)

    return _svd_seconds(timer) / timing.quantile(timer.interleave({"refresh": run}, seconds=3, at_least=5)["refresh"], 0.5)


@functools.cache
def _model_cycle(timer):
    """Rows of llama-60m's matrices over two gaps."""
    settings = optimizers.Settings(shapes.matrices("llama-60m"), RANK, torch.float32, 200, "cpu")
    return optimizers.measure(settings, ("lowrank", "galore-torch"), timer, base="galore-torch", steps=2 * settings.gap,
                              svd=True)


def amortised(timer):
    return 1 / _model_cycle(timer)[0]["amortised_ratio"]


def worst_step(timer):
    ours = _model_cycle(timer)[0]
    return ours["worst_s"] / ours["median_s"]


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
        tokens = torch.stack([stream[i:i + seq_len] for i in starts])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, weight in weights if step % gap == 0 else ():
            grad, left, energies = weight.grad, weight.shape[0] < weight.shape[1], kernels.energies(weight.grad)
            for rank in ranks:
                old = bases.get((name, rank))
                basis = randomized_basis(grad, old, rank=rank, left=left)
                bases[name, rank] = basis
                if step:
                    shares.append(kernels.captured(grad, basis, left) / energies[:rank].sum().item())
        optimizer.step()
    return min(shares)


def overhead(timer):
    """Microseconds a matrix of a step on as many tiny matrices as llama-7b has weights."""
    return 1e6 * optimizers.overhead("lowrank", len(shapes.matrices("llama-7b")), "cpu")


def extra_memory(timer):
    """Most bytes a step holds beyond weights, gradients and state, over the bytes of the m x n matrix."""
    settings = optimizers.Settings([(SIZE, SIZE)], RANK, torch.float32, optimizers.NEVER, "cpu")
    optimizer = optimizers.build("lowrank", settings)
    optimizer.step()
    return timing.extra_bytes(optimizer.step, "cpu") / (4 * SIZE * SIZE)


HERE = f"{SIZE}x{SIZE}, r = {RANK}, fp32"
FLOORS = [
    Floor(f"galore_step over its two bare GEMMs, {HERE}", "<= 1.15x", 1.15, galore_step, False),
    Floor(f"GaLoreAdamW step against galore-torch, {HERE}", ">= 1.8x faster", 1.8, steady_step, True),
    Floor("GaLoreAdamW on llama-60m, amortised over a gap of 200, against galore-torch", ">= 1.4x faster", 1.4, amortised,
          True),
    Floor("GaLoreAdamW on llama-60m, worst step over the median", "<= 2x", 2.0, worst_step, False),
    Floor(f"refresh against SVD, {SIZE}x{SIZE}, r = {RANK}", ">= 100x faster", 100.0,
          functools.partial(refresh, rank=RANK), True, "{:.0f}x"),
    Floor(f"refresh against SVD, {SIZE}x{SIZE}, r = 1024", ">= 30x faster", 30.0,
          functools.partial(refresh, rank=1024), True, "{:.0f}x"),
    Floor("energy of a refreshed basis of the best, r = 8, 32, 128, gradients of a llama-9m", ">= 99%", 0.99, energy, True,
          "{:.2%}"),
    Floor("memory a step holds beyond the state, of an m x n matrix", "< 50%", 0.5, extra_memory, False, "{:.1%}"),
    Floor("overhead of a step a matrix, llama-7b's 224 weights", "<= 25 µs", 25.0, overhead, False, "{:.1f} µs"),
]


def add_arguments(parser):
    report.add_output_arguments(parser)


def run(args):
    for package, name in (("galore_torch", "galore-torch"), ("transformers", "transformers")):
        try:
            __import__(package)
        except ImportError as error:
            raise CommandError(f"{name} is not installed ({error}): pip install {name}") from None
    facts = machine.describe("cpu")
    out = report.Report(args, facts)
    out.say(machine.line(facts))
    timer = timing.Timer("cpu")
    width = max(len(floor.what) for floor in FLOORS)
    for floor in FLOORS:
        figure = floor.measure(timer)
        holds = floor.holds(figure)
        out.say(f"{floor.what:{width}}  {floor.promise:15} {floor.form.format(figure):>9}  {'ok' if holds else 'MISSED'}")
        out.rows.append({"floor": floor.what, "promise": floor.promise, "limit": floor.limit, "figure": figure,
                         "holds": holds, "command": "lowrank bench floors"})
    out.write()
    missed = sum(not row["holds"] for row in out.rows)
    if missed:
        raise CommandError(f"{missed} of {len(FLOORS)} floors missed", code=1)
    return 0
