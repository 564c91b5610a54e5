"""`lowrank bench optimizers`: a whole optimizer step over the matrices of a model, ours beside its peers."""

import argparse
import contextlib
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch

from lowrank_sys.bench import compare, machine, plot, report, shapes, timing
from lowrank_sys.bench.cases import case
from lowrank_sys.cli import CommandError
from lowrank_sys.optim.preset import METHODS
from lowrank_sys.train.models import PRESETS

SCALE, LR = 0.25, 1e-3
# Size of the matrices, and their rank, on which the time of a step is all overhead.
TINY, TINY_RANK = 8, 4
OVERHEAD_SECONDS = 0.5
NEVER = 10**9
# Steps that are timed, and those of them that refresh every basis.
STEPS, REFRESHES = 30, 3
# What identifies a row.
KEYS = ("optimizer", "model", "shapes", "rank", "dtype", "gap")


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
    periodic: bool = False  # whether a basis is refreshed every `gap` steps
    module: str = "torch"
    install: str = "torch"  # the package, as pip knows it
    int8: bool = False  # over INT8 weights
    ours: bool = False


def _ours(name, *, int8=False, **keys):
    def build(params, settings):
        from lowrank_sys import optim

        return getattr(optim, name)(settings.groups(params, **keys), lr=LR)

    return Contender(build, periodic=True, int8=int8, ours=True)


def _galore_torch(params, settings):
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(settings.groups(params), lr=LR, no_deprecation_warning=True)


APOLLO = {"proj": "random", "scale_type": "channel", "scale": 1.0}


def _apollo_torch(params, settings):
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(settings.groups(params, **APOLLO), lr=LR)


def _bitsandbytes(params, settings):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=LR)


def _torchao(name):
    def build(params, settings):
        from torchao import optim

        return getattr(optim, name)(params, lr=LR)

    return build


class BareGemms:
    """The two products of every matrix, and nothing else."""

    def __init__(self, params, settings):
        self.state = {}
        self.products = []
        for param in params:
            m, n = param.shape
            one = case.Case("gemms", m, n, settings.rank, settings.dtype, m < n, settings.device)
            basis = case.orthonormal(one, lambda *size, dtype: torch.randn(size, dtype=dtype, device=settings.device))
            tensors = {"param": param.detach(), "grad": param.grad, "basis": basis}
            self.products.append(case.two_products(tensors, one))

    def step(self):
        for product in self.products:
            product()


CONTENDERS = {
    "lowrank": _ours("GaLoreAdamW"),
    "lowrank-int8": _ours("GaLoreAdamW", int8_gemm=True),
    "galore8bit": _ours("GaLoreAdamW8bit"),
    "q-galore": _ours("QGaLoreAdamW8bit", cos_threshold=None, int8=True),  # a gap that does not grow
    "galore-torch": Contender(_galore_torch, True, "galore_torch", "galore-torch"),
    "apollo": _ours("APOLLOAdamW", **APOLLO),
    "apollo-torch": Contender(_apollo_torch, True, "apollo_torch", "apollo-torch"),
    "fira": _ours("FiraAdamW", alpha=SCALE),
    "grass": _ours("GrassAdamW"),
    "frugal": _ours("FrugalAdamW"),
    "adamw-fused": Contender(lambda params, _: torch.optim.AdamW(params, lr=LR, fused=True)),
    "adamw-foreach": Contender(lambda params, _: torch.optim.AdamW(params, lr=LR, foreach=True)),
    "bitsandbytes": Contender(_bitsandbytes, module="bitsandbytes", install="bitsandbytes"),
    "torchao-8bit": Contender(_torchao("AdamW8bit"), module="torchao", install="torchao"),
    "torchao-4bit": Contender(_torchao("AdamW4bit"), module="torchao", install="torchao"),
    "gemms": Contender(BareGemms),
}


def _method(method):
    """A method with its own group keys, at the rank and the gap that are asked for unless it has others."""

    def build(params, settings):
        usual = {"scale": 0.25, "rank": 128, "update_proj_gap": 200}
        own = {key: getattr(method, key) for key, value in usual.items() if getattr(method, key) != value}
        if method.rank is not None:
            own |= {"subspace": method.subspace, method.scale_key: method.scale}
        return method.optimizer(settings.groups(params, **{**own, **method.keys}), lr=LR, **method.options)

    return Contender(build, periodic=method.rank is not None and method.update_proj_gap > 1, ours=True)


# The methods of the command line that are not there yet; "lowrank" is galore.
CONTENDERS |= {name: _method(one) for name, one in sorted(METHODS.items()) if name not in {*CONTENDERS, "galore"}}


def why_missing(name):
    """'' if a contender can be imported, else how to install it."""
    why = machine.absent(CONTENDERS[name].module, CONTENDERS[name].install)
    return f"{name}: {why}" if why else ""


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
        weight = 0.02 * randn(m, n)
        params.append(_quantized(weight) if CONTENDERS[name].int8 else torch.nn.Parameter(weight))
        params[-1].grad = randn(m, n)
    return CONTENDERS[name].build(params, settings)


def _quantized(weight):
    from lowrank_sys.nn.quant_weight import QuantWeight

    return QuantWeight(*torch.ops.lowrank.quantize_int8(weight), dtype=weight.dtype)


def _tensors(value):
    """The plain tensors of a value of a state: itself, the parts of a subclass, or what an object keeps."""
    if hasattr(value, "__tensor_flatten__"):  # torchao's codes and scales
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    else:  # galore-torch's projector
        yield from (item for item in getattr(value, "__dict__", {}).values() if isinstance(item, torch.Tensor))


def state_bytes(optimizer):
    """Bytes that the state keeps alive: whole storages, since a slice of an SVD's factor keeps the factor."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for item in _tensors(value):
                storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def overhead(name, count, device):
    """Seconds a matrix that a steady step takes on `count` matrices too small to compute with."""
    optimizer = build(name, Settings([(TINY, TINY)] * count, TINY_RANK, torch.float32, NEVER, device))
    timer = timing.Timer(device, flush=False, graphs=False)
    times = timer.interleave({name: optimizer.step}, seconds=OVERHEAD_SECONDS, at_least=20)[name]
    return timing.quantile(times, 0.5) / count


def cycle(times, gap):
    """(mean, worst) step over a whole gap of `times`, or (None, None) if they do not cover one.

    The schedule repeats with the gap: of the steps that do the same work, the fastest counts, so that what else the machine
    did is no stall of the optimizer.
    """
    if len(times) < gap:
        return None, None
    positions = [min(times[i::gap]) for i in range(gap)]
    return sum(positions) / gap, max(positions)


def refresh(name, settings, timer):
    """Seconds of a step that refreshes every basis from the one before."""
    optimizer = build(name, settings._replace(gap=1))
    optimizer.step()  # the first bases
    return timing.quantile([timer(optimizer.step) for _ in range(REFRESHES)], 0.5)


def measure(settings, names, timer, *, base, steps, svd):
    """Rows, one a contender: the first step apart, then `steps` steps of all, interleaved."""
    with contextlib.ExitStack() as stack:
        if "galore-torch" in names and not svd:
            stack.enter_context(random_bases())
        optimizers = {name: build(name, settings) for name in names}
        first = {name: timer(optimizer.step) for name, optimizer in optimizers.items()}
        times = timer.interleave(
            {name: optimizer.step for name, optimizer in optimizers.items()}, seconds=0, at_least=steps, warmup=0
        )
        rows = []
        times = {name: timing.parts(samples) for name, samples in times.items()}
        for name, optimizer in optimizers.items():
            found = timing.spread(times[name])
            row = {
                "optimizer": name,
                "median_s": found.median,
                "p20_s": found.p20,
                "p80_s": found.p80,
                "spread": found.relative,
                "samples": steps,
                "first_s": first[name],
                "refresh_s": None,
                "amortised_s": None,
                "worst_s": None,
                "ratio": None,
                "noise": None,
            }
            if name == "galore-torch" and not svd:
                row["first_s"] = None
            elif CONTENDERS[name].periodic and settings.gap != NEVER:
                row |= _periodic(name, settings, timer, found.median, sum(times[name], []))
            if name != base:
                row["ratio"], row["noise"] = timing.ratio(times[name], times[base])
            row |= {
                "state_bytes": state_bytes(optimizer),
                "extra_bytes": timing.extra_bytes(optimizer.step, settings.device),
                "overhead_s": overhead(name, len(settings.matrices), settings.device),
            }
            rows.append(row)
    amortised = {row["optimizer"]: row["amortised_s"] for row in rows}
    for row in rows:
        known = row["optimizer"] != base and row["amortised_s"] and amortised[base]
        row["amortised_ratio"] = row["amortised_s"] / amortised[base] if known else None
    return rows


def _periodic(name, settings, timer, step, times):
    """The refresh apart, and over a gap: as measured where the steps cover one, else what follows from one refresh of all."""
    mean, worst = cycle(times, settings.gap)
    more = max(refresh(name, settings, timer) - step, 0.0)
    return {"refresh_s": more, "amortised_s": mean or step + more / settings.gap, "worst_s": worst}


def add_arguments(parser):
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shape", nargs="+", type=shapes.parse_shape, metavar="MxN", help="default: 4096x4096")
    sizes.add_argument("--model", choices=PRESETS, metavar="NAME", help=f"the linear weights of a model: {', '.join(PRESETS)}")
    parser.add_argument("--rank", type=shapes.positive, default=128, metavar="R", help="default: 128")
    parser.add_argument(
        "--dtype",
        choices=shapes.DTYPES,
        default="fp32",
        metavar="D",
        help=f"of weights and gradients: {', '.join(shapes.DTYPES)} (default: fp32)",
    )
    parser.add_argument(
        "--optimizers", type=_names, metavar="A,B", help=f"of {', '.join(CONTENDERS)} (default: all that are installed)"
    )
    parser.add_argument(
        "--base",
        choices=CONTENDERS,
        metavar="NAME",
        help="what ratios refer to (default: galore-torch, or the first of --optimizers)",
    )
    parser.add_argument(
        "--gap", type=shapes.positive, default=200, metavar="N", help="steps between two refreshes of a basis (default: 200)"
    )
    parser.add_argument(
        "--steps",
        type=shapes.positive,
        metavar="N",
        default=STEPS,
        help="steps to time (default: %(default)s; a whole gap shows the worst step too)",
    )
    parser.add_argument(
        "--svd",
        action="store_true",
        help="let galore-torch take its SVDs (most of a minute for one 4096x4096), instead of timing only its "
        "steady step, from a random basis",
    )
    parser.add_argument("--device", type=shapes.parse_device, default=shapes.default_device(), help="default: %(default)s")
    report.add_output_arguments(parser, compare=True, plot="a step of each and its state")


def _names(text):
    names = text.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; valid: {', '.join(CONTENDERS)}")
    return list(dict.fromkeys(names))


def command(args, name, base):
    """The command that repeats one row."""
    sizes = args.shape or [(4096, 4096)]
    sizes = f"--model {args.model}" if args.model else "--shape " + " ".join(f"{m}x{n}" for m, n in sizes)
    names = name if name == base else f"{name},{base}"
    return (
        f"lowrank bench optimizers {sizes} --rank {args.rank} --dtype {args.dtype} --optimizers {names} --base {base} "
        f"--gap {args.gap} --steps {args.steps}{' --svd' if args.svd else ''} --device {args.device}"
    )


def _with_noise(row):
    return report.number(row["ratio"], "{:.3g}") + (" (noise)" if row["noise"] else "")


COLUMNS = [
    ("optimizer", lambda row: row["optimizer"]),
    ("step", lambda row: report.seconds(row["median_s"])),
    ("p20", lambda row: report.seconds(row["p20_s"])),
    ("p80", lambda row: report.seconds(row["p80_s"])),
    ("spread", lambda row: report.number(row["spread"], "{:.1%}")),
    ("step / base", _with_noise),
    ("first", lambda row: report.seconds(row["first_s"])),
    ("refresh", lambda row: report.seconds(row["refresh_s"])),
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
    base = args.base or (args.optimizers or ["galore-torch"])[0]
    missing = {name: why for name in args.optimizers or CONTENDERS if (why := why_missing(name))}
    if why := why_missing(base):
        raise CommandError(f"--base {why}")
    if args.optimizers and missing:
        raise CommandError(f"--optimizers {next(iter(missing.values()))}")
    names = [name for name in dict.fromkeys([*(args.optimizers or CONTENDERS), base]) if name not in missing]
    settings = Settings(matrices, args.rank, shapes.DTYPES[args.dtype], args.gap, args.device)
    facts = machine.describe(args.device)
    facts |= {package: metadata.version(package) for name in names if (package := CONTENDERS[name].install) != "torch"}
    out = report.Report(args, facts)
    old = compare.read(args.compare, KEYS, facts)
    out.say(machine.line(facts))
    for why in missing.values():
        out.say(why)
    rows = measure(settings, names, timing.Timer(args.device, graphs=False), base=base, steps=args.steps, svd=args.svd)
    sizes = " ".join(f"{m}x{n}" for m, n in dict.fromkeys(matrices))
    named = {
        "model": args.model,
        "shapes": sizes,
        "matrices": len(matrices),
        "elements": sum(m * n for m, n in matrices),
        "rank": args.rank,
        "dtype": args.dtype,
        "gap": args.gap,
        "base": base,
    }
    title = f"matrices: {len(matrices)}, weights: {named['elements'] / 1e6:.1f}M, r = {args.rank}, {args.dtype}"
    out.table(
        f"{facts['device']} | {title}",
        COLUMNS,
        [{**named, **row, "command": command(args, row["optimizer"], base)} for row in rows],
    )
    for row in out.rows:
        out.say(row["command"])
    out.say(
        f"step: median; refresh: of every basis, beyond a step; amortised, worst: over a gap of {args.gap}; extra: most "
        f"memory a step holds beyond the state; overhead: a step's time a matrix on {TINY}x{TINY} matrices"
    )
    if "galore-torch" in names and not args.svd:
        out.say("galore-torch: steady steps only, from random bases in place of its SVD (--svd times that too)")
    slower = compare.judge(out, old, KEYS, args.compare, lambda row: CONTENDERS[row["optimizer"]].ours) if old else 0
    out.write(draw=plot.bars)
    compare.refuse(slower, args.compare)
    return 0
