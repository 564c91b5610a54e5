"""`lowrank bench optimizers`: a whole optimizer step over the matrices of a model, ours beside its peers."""

import contextlib
import importlib
from typing import Callable, NamedTuple

import torch

from lowrank_sys.bench import machine, report, shapes, timing
from lowrank_sys.cli import CommandError
from lowrank_sys.train.models import PRESETS

SCALE, LR = 0.25, 1e-3
# Size of the matrices, and their rank, on which the time of a step is all overhead.
TINY, TINY_RANK = 8, 4
NEVER = 10**9


class Settings(NamedTuple):
    matrices: list  # of (m, n)
    rank: int
    dtype: torch.dtype
    gap: int  # steps between two refreshes of a basis
    device: str

    def groups(self, params, **keys):
        """The low-rank group in GaLore's spelling, which ours shares, with the keys of other methods."""
        return [{"params": params, "rank": self.rank, "update_proj_gap": self.gap, "proj_type": "std", "scale": SCALE, **keys}]


class Contender(NamedTuple):
    build: Callable  # (parameters, settings) -> optimizer
    module: str = "torch"
    install: str = ""


def _ours(name, **keys):
    def build(params, settings):
        from lowrank_sys import optim

        return getattr(optim, name)(settings.groups(params, **keys), lr=LR)

    return build


def _galore_torch(params, settings):
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(settings.groups(params), lr=LR, no_deprecation_warning=True)


APOLLO = {"proj": "random", "scale_type": "channel", "scale": 1.0}


def _apollo_torch(params, settings):
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(settings.groups(params, **APOLLO), lr=LR)


CONTENDERS = {
    "lowrank": Contender(_ours("GaLoreAdamW")),
    "galore-torch": Contender(_galore_torch, "galore_torch", "galore-torch"),
    "apollo": Contender(_ours("APOLLOAdamW", **APOLLO)),
    "apollo-torch": Contender(_apollo_torch, "apollo_torch", "apollo-torch"),
    "fira": Contender(_ours("FiraAdamW", alpha=SCALE)),
    "grass": Contender(_ours("GrassAdamW")),
    "frugal": Contender(_ours("FrugalAdamW")),
    "adamw-fused": Contender(lambda params, _: torch.optim.AdamW(params, lr=LR, fused=True)),
    "adamw-foreach": Contender(lambda params, _: torch.optim.AdamW(params, lr=LR, foreach=True)),
}
PERIODIC = ("lowrank", "galore-torch")


def why_missing(name):
    """'' if a contender can be imported, else how to install it."""
    try:
        importlib.import_module(CONTENDERS[name].module)
    except ImportError as error:
        return f"{name} is not installed ({error}): pip install {CONTENDERS[name].install}"
    return ""


@contextlib.contextmanager
def random_bases():
    """galore-torch takes random orthonormal bases, in the memory layout of its SVD's, in place of the SVD itself."""
    from galore_torch.galore_projector import GaLoreProjector

    def random_basis(projector, gradient, rank, type):
        m, n = gradient.shape
        right = type == "right"
        d = n if right else m
        q = torch.linalg.qr(torch.randn(d, rank, device=gradient.device)).Q
        factor = torch.empty(d, min(m, n), device=gradient.device)  # V, or U transposed: the projector keeps a view
        factor = factor.T if right else factor.view(min(m, n), d).T
        basis = factor[:rank] if right else factor[:, :rank]
        return basis.copy_(q.T if right else q).to(gradient.dtype)

    original = GaLoreProjector.get_orthogonal_matrix
    GaLoreProjector.get_orthogonal_matrix = random_basis
    try:
        yield
    finally:
        GaLoreProjector.get_orthogonal_matrix = original


def build(name, settings):
    """An optimizer over fresh parameters that have gradients."""
    generator = torch.Generator(settings.device).manual_seed(0)

    def randn(m, n):
        return torch.randn(m, n, generator=generator, device=settings.device).to(settings.dtype)

    params = []
    for m, n in settings.matrices:
        params.append(torch.nn.Parameter(0.02 * randn(m, n)))
        params[-1].grad = randn(m, n)
    return CONTENDERS[name].build(params, settings)


def state_bytes(optimizer):
    """Bytes that the state keeps alive: whole storages, since a slice of an SVD's factor keeps the factor."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for item in [value, *getattr(value, "__dict__", {}).values()]:  # galore-torch keeps its basis in an object
                if isinstance(item, torch.Tensor):
                    storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def overhead(name, count, device):
    """Seconds a matrix that a steady step takes on `count` matrices too small to compute with."""
    optimizer = build(name, Settings([(TINY, TINY)] * count, TINY_RANK, torch.float32, NEVER, device))
    timer = timing.Timer(device, flush=False)
    return timing.quantile(timer.interleave({name: optimizer.step}, seconds=0.5, at_least=20)[name], 0.5) / count


def cycle(times, gap):
    """(mean, worst) step over a whole gap of `times`, or (None, None) if they do not cover one.

    The schedule repeats with the gap: of the steps that do the same work, the fastest counts, so that what else the machine
    did is no stall of the optimizer.
    """
    if len(times) < gap:
        return None, None
    positions = [min(times[i::gap]) for i in range(gap)]
    return sum(positions) / gap, max(positions)


def measure(settings, names, timer, *, base, steps, svd):
    """Rows, one a contender: the first step apart, then `steps` steps of all, interleaved."""
    with contextlib.ExitStack() as stack:
        if "galore-torch" in names and not svd:
            stack.enter_context(random_bases())
        optimizers = {name: build(name, settings) for name in names}
        first = {name: timer(optimizer.step) for name, optimizer in optimizers.items()}
        times = timer.interleave({name: optimizer.step for name, optimizer in optimizers.items()}, seconds=0,
                                 at_least=steps, warmup=0)
        rows = []
        for name, optimizer in optimizers.items():
            p20, median, p80 = timing.spread(times[name])
            mean, worst = cycle(times[name], settings.gap)
            row = {"optimizer": name, "median_s": median, "p20_s": p20, "p80_s": p80, "samples": steps,
                   "first_s": first[name], "worst_s": worst, "amortised_s": mean, "ratio": None, "noise": None}
            if name == "galore-torch" and not svd:
                row |= dict.fromkeys(("first_s", "worst_s", "amortised_s"))
            if name != base:
                row["ratio"], row["noise"] = timing.ratio(times[name], times[base])
            row |= {"state_bytes": state_bytes(optimizer),
                    "extra_bytes": timing.extra_bytes(optimizer.step, settings.device),
                    "overhead_s": overhead(name, len(settings.matrices), settings.device)}
            rows.append(row)
    amortised = {row["optimizer"]: row["amortised_s"] for row in rows}
    for row in rows:
        known = row["optimizer"] != base and row["amortised_s"] and amortised[base]
        row["amortised_ratio"] = row["amortised_s"] / amortised[base] if known else None
    return rows


def add_arguments(parser):
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shape", nargs="+", type=shapes.parse_shape, metavar="MxN", help="default: 4096x4096")
    sizes.add_argument("--model", choices=PRESETS, metavar="NAME",
                       help=f"the linear weights of a model: {', '.join(PRESETS)}")
    parser.add_argument("--rank", type=shapes.positive, default=128, metavar="R", help="default: 128")
    parser.add_argument("--dtype", choices=shapes.DTYPES, default="fp32", metavar="D",
                        help=f"of weights and gradients: {', '.join(shapes.DTYPES)} (default: fp32)")
    parser.add_argument("--base", choices=CONTENDERS, default="galore-torch", metavar="NAME",
                        help=f"what ratios refer to: {', '.join(CONTENDERS)} (default: galore-torch)")
    parser.add_argument("--gap", type=shapes.positive, default=200, metavar="N",
                        help="steps between two refreshes of a basis (default: 200)")
    parser.add_argument("--steps", type=shapes.positive, metavar="N",
                        help="steps to time (default: one gap; fewer show neither the amortised nor the worst step)")
    parser.add_argument("--svd", action="store_true",
                        help="let galore-torch take its SVDs (most of a minute for one 4096x4096), instead of timing only its "
                        "steady step, from a random basis")
    parser.add_argument("--device", type=shapes.parse_device, default=shapes.default_device(), help="default: %(default)s")
    report.add_output_arguments(parser)


def command(args):
    """The command that repeats this run."""
    sizes = args.shape or [(4096, 4096)]
    sizes = f"--model {args.model}" if args.model else "--shape " + " ".join(f"{m}x{n}" for m, n in sizes)
    return (f"lowrank bench optimizers {sizes} --rank {args.rank} --dtype {args.dtype} --base {args.base} --gap {args.gap} "
            f"--steps {args.steps or args.gap}{' --svd' if args.svd else ''} --device {args.device}")


def _with_noise(row):
    return report.number(row["ratio"], "{:.3g}") + (" (noise)" if row["noise"] else "")


COLUMNS = [
    ("optimizer", lambda row: row["optimizer"]),
    ("step", lambda row: report.seconds(row["median_s"])),
    ("p20", lambda row: report.seconds(row["p20_s"])),
    ("p80", lambda row: report.seconds(row["p80_s"])),
    ("step / base", _with_noise),
    ("first", lambda row: report.seconds(row["first_s"])),
    ("amortised", lambda row: report.seconds(row["amortised_s"])),
    ("amort. / base", lambda row: report.number(row["amortised_ratio"], "{:.3g}")),
    ("worst", lambda row: report.seconds(row["worst_s"])),
    ("worst / step", lambda row: row["worst_s"] and report.number(row["worst_s"] / row["median_s"], "{:.2f}") or ""),
    ("state", lambda row: report.size(row["state_bytes"])),
    ("extra", lambda row: report.size(row["extra_bytes"])),
    ("overhead", lambda row: report.seconds(row["overhead_s"])),
]


def run(args):
    matrices = shapes.matrices(args.model) if args.model else args.shape or [(4096, 4096)]
    for m, n in matrices:
        shapes.check_rank(args.rank, m, n)
    missing = {name: why for name in CONTENDERS if (why := why_missing(name))}
    if args.base in missing:
        raise CommandError(f"--base {missing[args.base]}")
    names = [name for name in CONTENDERS if name not in missing]
    settings = Settings(matrices, args.rank, shapes.DTYPES[args.dtype], args.gap, args.device)
    facts = machine.describe(args.device)
    out = report.Report(args, facts)
    out.say(machine.line(facts))
    for why in missing.values():
        out.say(why)
    rows = measure(settings, names, timing.Timer(args.device), base=args.base, steps=args.steps or args.gap, svd=args.svd)
    named = {"model": args.model, "matrices": len(matrices), "elements": sum(m * n for m, n in matrices), "rank": args.rank,
             "dtype": args.dtype, "gap": args.gap, "base": args.base, "command": command(args)}
    title = f"{facts['device']} | matrices: {len(matrices)}, weights: {named['elements'] / 1e6:.1f}M"
    out.table(f"{named['command']}\n{title}", COLUMNS, [{**named, **row} for row in rows])
    out.say("step: median; amortised, worst: over a whole gap with its refreshes; extra: most memory a step holds beyond the "
            f"state; overhead: a step's time a matrix on {TINY}x{TINY} matrices")
    if "galore-torch" in names and not args.svd:
        out.say("galore-torch: steady steps only, from random bases in place of its SVD (--svd times that too)")
    out.write()
    return 0
