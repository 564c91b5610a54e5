"""`lowrank bench kernels`: every op against the oracle and against what else one could call."""

import itertools
import time

import torch

from lowrank_sys.bench import compare, machine, plot, report, shapes, timing
from lowrank_sys.bench.cases import ONCE, OPS, PACKAGES, copies, double, make, serving
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.cli import CommandError

# A kernel may be this many times as wrong as the oracle at the same precision, plus a few roundings of fp32.
TOLERANCE, ROUNDING = 2.0, 1e-6
# On a GPU products round otherwise than the oracle's, which are cuBLAS's: of fp32 operands three tf32 products are summed, which
# lose up to 2^-22 of each operand and the product of two such rests, 3 x 2^-22 together; and tensor cores cut off the last bit of
# a sum after every K terms, half a unit of 2^-23 of it on average, always towards zero. Plain tf32 would be 2^-11 off.
SPLIT, CUT, K = 3 * 2.0**-22, 2.0**-24, {4: 8, 2: 16}
# Share of the best rank-r energy that a basis may miss beyond what the oracle misses.
ENERGY_TOLERANCE = 1e-3
# Every case is timed this many times, from the first case to the last and again, in memory of its own each time, and at least
# in so many rounds each time.
PASSES, ROUNDS = 5, 2
# Seconds of timing: of all cases together, and the most of one. What is beside it counts too: past the limit there is no pass
# after the second.
BUDGET, MOST, LIMIT = 75.0, 2.0, 140.0
BACKENDS = ("reference", "cpu", "triton", "cuda")
# What identifies a row.
KEYS = ("op", "shape", "rank", "dtype", "side", "variant")


def add_arguments(parser):
    parser.add_argument(
        "--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=f"one or more of {', '.join(OPS)} (default: all)"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--shape", nargs="+", type=shapes.parse_shape, metavar="MxN", help="default: 4096x4096; 1024x1024 where the base is an SVD"
    )
    sizes.add_argument(
        "--model", choices=shapes.MODELS, metavar="NAME", help=f"the linear weights of a model: {', '.join(shapes.MODELS)}"
    )
    parser.add_argument("--rank", nargs="+", type=shapes.positive, default=[128], metavar="R", help="default: 128")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=shapes.DTYPES,
        default=["fp32"],
        metavar="D",
        help=f"of weights, gradients and bases: {', '.join(shapes.DTYPES)} (default: fp32)",
    )
    parser.add_argument("--side", choices=("left", "right", "both"), default="both", help="of the basis (default: both)")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        metavar="NAME",
        help=f"only these: {', '.join(BACKENDS)} (default: who serves the op here, and the oracle)",
    )
    parser.add_argument("--base", metavar="NAME", help="what ratios refer to: reference, or the op's own base (see --list)")
    parser.add_argument("--device", type=shapes.parse_device, default=shapes.default_device(), help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=shapes.seconds,
        metavar="S",
        help=f"of timing a case (default: {BUDGET:g} for all cases together, at most {MOST:g} each)",
    )
    parser.add_argument("--list", action="store_true", help="list the ops, their implementations here and their bases")
    report.add_output_arguments(parser, compare=True, plot="the share of the roofline, a bar an op")


def cases(args):
    """The cases that the flags name."""
    sides = {"left": [True], "right": [False], "both": [True, False]}[args.side]
    found = {}
    for name, dtype in itertools.product(args.op, args.dtype):
        op = OPS[name]
        if args.base not in (None, "reference", *op.bases):
            raise CommandError(f"--base {args.base}: unknown for {name}; valid: {', '.join(['reference', *op.bases])}")
        base = args.base or next(iter(op.bases))
        sizes = args.shape or (args.model and shapes.matrices(args.model))
        sizes = sizes or [(1024, 1024) if base in ONCE else (4096, 4096)]
        for (m, n), rank, left in itertools.product(sizes, args.rank, sides):
            if op.ranked:
                shapes.check_rank(rank, m, n)
            rank, left = rank if op.ranked else None, left if op.sided else None
            found[Case(name, m, n, rank, shapes.DTYPES[dtype], left, args.device)] = None  # a dict: unique, in order
    if args.backend:
        found = {case: None for case in found if {backend(serving(case)[0], case), "reference"} & {*args.backend}}
    if not found:
        raise CommandError(f"--backend {' '.join(args.backend)}: serves none of these ops on {args.device}")
    return list(found)


def backend(implementation, case):
    """The name of BACKENDS for an implementation of backends.table()."""
    return {"reference": "reference", "Triton": "triton"}.get(implementation, torch.device(case.device).type)


def command(case, base):
    """The command that repeats a case."""
    side = f" --side {case.side}" if case.side else ""
    rank = f" --rank {case.rank}" if case.rank else ""
    dtype = shapes.SPELLING[case.dtype]
    return (
        f"lowrank bench kernels --op {case.op} --shape {case.m}x{case.n}{rank} --dtype {dtype}{side} --base {base} "
        f"--device {case.device}"
    )


def energies(grad):
    """The squared singular values of G, largest first, in fp64: the best rank r has the energy of the first r."""
    g = grad.double()
    gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    return torch.linalg.eigvalsh(gram).flip(0)


def captured(grad, basis, left):
    """|project(G)|² in fp64, the energy of G in the span of an orthonormal basis."""
    g, b = grad.double(), basis.double()
    return (b.T @ g if left else g @ b).square().sum().item()


def products_rounding(case):
    """How far tensor cores may be off beyond the oracle, relative to the result; 0 on a CPU, and where there are no products."""
    if torch.device(case.device).type != "cuda" or not {"gemm", "gemms"} & OPS[case.op].bases.keys():
        return 0.0
    return SPLIT * (case.dtype == torch.float32) + CUT * max(case.m, case.n) / K[case.element]


class Check:
    """Errors of an implementation of a case against fp64, and whether they are acceptable beside the oracle's."""

    def __init__(self, case):
        self.case, self.op, self._inputs = case, OPS[case.op], make(case)
        if self.op.chooses:
            self.best = energies(self._inputs["grad"])[: case.rank].sum().item()
        else:
            truth = self.op.truth or self.op.oracle
            self.truth = self.outputs(truth, copies(self._inputs) if self.op.exact else double(self._inputs))
        self.oracle = {"error": 0.0, "energy": None} if self.op.exact else self.figures(self.op.oracle)

    def outputs(self, function, tensors):
        return self.op.read(self.op.call(function, tensors, self.case))

    def figures(self, function):
        """{'error': relative to fp64, of the worst result; 'energy': of a basis, beside the best one of that rank}."""
        tensors = copies(self._inputs)
        outputs = self.outputs(function, tensors)
        if not self.op.chooses:
            return {"error": max(_relative_error(o, t) for o, t in zip(outputs, self.truth)), "energy": None}
        # The vectors are unique only up to rotations of equal singular values: what counts is that they are orthonormal
        # and what they capture.
        basis = outputs[0].double()
        eye = torch.eye(self.case.rank, dtype=basis.dtype, device=basis.device)
        return {
            "error": _relative_error(basis.T @ basis, eye),
            "energy": captured(tensors["grad"], basis, self.case.left) / self.best,
        }

    def verdict(self, figures):
        """'ok', or why the implementation is wrong."""
        limit = 0 if self.op.exact else TOLERANCE * self.oracle["error"] + ROUNDING + products_rounding(self.case)
        if not figures["error"] <= limit:
            return f"wrong: error {figures['error']:.1e}, at most {limit:.1e}"
        if figures["energy"] is not None and not figures["energy"] >= self.oracle["energy"] - ENERGY_TOLERANCE:
            return f"wrong: energy {figures['energy']:.2%}, the oracle has {self.oracle['energy']:.2%}"
        return "ok"


def _relative_error(output, truth):
    error = torch.linalg.vector_norm(output.double() - truth)
    return (error / torch.linalg.vector_norm(truth.double())).item() if error != 0 else 0.0


class Trial:
    """A case and its variants: who serves the op, the oracle, and the base. A wrong variant is not timed.

    base: '' for none. backends: of BACKENDS, the only ones to run. once: times of bases that are taken once, which several
    cases may share.
    """

    def __init__(self, case, *, base=None, backends=None, once=None):
        self.case, self.op = case, OPS[case.op]
        self.base = next(iter(self.op.bases)) if base is None else base
        self.once = {} if once is None else once
        name, function = serving(case)
        self.functions = {name: function, "reference": self.op.oracle}
        if backends:
            self.functions = {name: f for name, f in self.functions.items() if backend(name, case) in backends or name == self.base}
        self.passes = {}  # variant -> [[seconds, ...], ...]
        self.calls = {}  # variant -> capture.Prepared
        self.quiet = []  # of each pass, whether nothing disturbed it

    def check(self, case=None):
        """Errors and verdicts of all variants: of this case, or of a smaller one in its place."""
        check = Check(case or self.case)
        self.figures = {name: check.oracle if name == "reference" else check.figures(f) for name, f in self.functions.items()}
        self.verdicts = {name: check.verdict(figures) for name, figures in self.figures.items()}

    def time(self, timer, seconds):
        """One more pass over all variants, on fresh tensors."""
        bases, case = self.op.bases, self.case
        inputs = make(case)
        if self.base in ONCE and not self.passes:
            key = (self.base, case.m, case.n, case.dtype)
            if key not in self.once:
                self.once[key] = timer(bases[self.base](copies(inputs), case))
            self.passes[self.base] = [[self.once[key]]]
        timed = {name: self._bind(f, copies(inputs)) for name, f in self.functions.items() if self.verdicts[name] == "ok"}
        oracle = timed.pop("reference", None)
        if self.base in bases and self.base not in ONCE:
            timed[self.base] = bases[self.base](copies(inputs), case)
        for function in timed.values():
            function()  # the first one in fresh memory
        for name, samples in timer.interleave(timed, seconds=seconds, at_least=ROUNDS, at_most=40, warmup=0).items():
            self.passes.setdefault(name, []).append(samples)
        self.calls |= {name: call._replace(run=None) for name, call in timer.prepared.items()}  # it would keep its tensors alive
        self.quiet.append(timer.quiet)
        # the oracle may take a thousand times as long
        if oracle and sum(map(sum, self.passes.get("reference", []))) <= PASSES * seconds:
            self.passes.setdefault("reference", []).append([timer(oracle)])

    def _bind(self, function, tensors):
        return lambda: self.op.call(function, tensors, self.case)

    @property
    def disturbed(self):
        """Whether too few passes were quiet to do without the others: the spread of such a case is not known."""
        return sum(self.quiet) < min(2, len(self.quiet))

    def samples(self):
        """{variant: passes} of the quiet passes, if there are enough; of what was not timed in them, all."""
        if self.disturbed:
            return self.passes
        kept = {name: [p for p, quiet in zip(passes, self.quiet) if quiet] for name, passes in self.passes.items()}
        return {name: kept[name] or passes for name, passes in self.passes.items()}

    def rows(self, ceilings):
        case, passes = self.case, self.samples()
        limits = bounds(case, ceilings)
        for variant in dict.fromkeys([*self.functions, *([self.base] if self.base in self.op.bases else [])]):
            yield {
                "op": case.op,
                "shape": f"{case.m}x{case.n}",
                "rank": case.rank,
                "dtype": shapes.SPELLING[case.dtype],
                "side": case.side,
                "variant": variant,
                "backend": backend(variant, case) if variant in self.functions else None,
                "check": self.verdicts.get(variant),
                **self.figures.get(variant, {"error": None, "energy": None}),
                **_speed(case, variant, passes, self.base, max(limits.values()), self.disturbed),
                **launching(self.calls.get(variant)),
                "bound": self.op.other or max(limits, key=limits.get),
                "base": self.base,
                "command": command(case, self.base),
            }


def launching(call):
    """What a call costs beside the time of its kernels, on a GPU; call: a capture.Prepared, or None."""
    return {"host_s": call and call.host_s, "launches": call and call.launches, "eager": call and call.eager}


def bounds(case, ceilings):
    """Seconds that the counted bytes and the counted products take at the measured ceilings.

    An fp32 product is three tf32 products, where that is faster.
    """
    op, rates = OPS[case.op], ceilings["gemm_gflop_per_s"]
    rate = rates[str(case.dtype).removeprefix("torch.")]
    if case.dtype == torch.float32:
        rate = max(rate, rates.get("tf32", 0) / 3)
    return {"bytes": op.traffic(case) / (1e9 * ceilings["copy_gb_per_s"]), "products": op.flop(case) / (1e9 * rate)}


def measure(case, timer, ceilings, *, seconds, base=None, backends=None):
    """Rows of one case, one a variant."""
    trial = Trial(case, base=base, backends=backends)
    trial.check()
    for _ in range(PASSES):
        trial.time(timer, seconds / PASSES)
    return list(trial.rows(ceilings))


def _speed(case, variant, passes, base, floor, disturbed):
    """The figures that follow from the samples of a variant; None where it was not timed, or does another computation."""
    names = ("median_s", "p20_s", "p80_s", "spread", "samples", "gb_per_s", "gflop_per_s", "roofline", "ratio", "noise")
    row = dict.fromkeys(names)
    if variant in passes:
        found = timing.spread(passes[variant])
        row |= {
            "median_s": found.median,
            "p20_s": found.p20,
            "p80_s": found.p80,
            "spread": found.relative,
            "samples": sum(map(len, passes[variant])),
        }
        if variant not in ONCE:
            op = OPS[case.op]
            row |= {
                "gb_per_s": op.traffic(case) / found.median / 1e9,
                "gflop_per_s": op.flop(case) / found.median / 1e9,
                "roofline": floor / found.median,
            }
        if variant != base and base in passes:
            row["ratio"], row["noise"] = timing.ratio(passes[variant], passes[base])
    if disturbed:
        row |= {"spread": None, "noise": None}
    return row | {"disturbed": disturbed}


def _widen(rows):
    """Give every row at least the median spread: few samples can lie close together by chance."""
    known = [row for row in rows if row["spread"] is not None]
    least = timing.quantile([row["spread"] for row in known], 0.5) if known else 0.0
    for row in known:
        row["spread"] = max(row["spread"], least)


COLUMNS = [
    ("variant", lambda row: row["variant"]),
    ("median", lambda row: report.seconds(row["median_s"])),
    ("p20", lambda row: report.seconds(row["p20_s"])),
    ("p80", lambda row: report.seconds(row["p80_s"])),
    ("spread", lambda row: report.number(row["spread"], "{:.1%}")),
    ("samples", lambda row: report.number(row["samples"], "{}")),
    ("GB/s", lambda row: report.number(row["gb_per_s"])),
    ("GFLOP/s", lambda row: report.number(row["gflop_per_s"])),
    ("roofline", lambda row: report.number(row["roofline"], "{:.0%}")),
    ("error", lambda row: report.number(row["error"], "{:.1e}")),
    ("energy", lambda row: report.number(row["energy"], "{:.2%}")),
    ("time / base", lambda row: "base" if row["variant"] == row["base"] else report.number(row["ratio"], "{:.3g}")),
    ("noise", lambda row: "disturbed" if row["disturbed"] else "noise" if row["noise"] else ""),
    ("check", lambda row: row["check"] or ""),
]


def run(args):
    if args.list:
        return print_list(args.device)
    chosen = cases(args)
    used = {args.base or next(iter(OPS[case.op].bases)) for case in chosen}
    absent = {name: machine.absent(*package) for name, package in PACKAGES.items() if name in used}
    if args.base and absent.get(args.base):
        raise CommandError(f"--base {args.base}: {absent[args.base]}")
    facts = machine.describe(args.device)
    out = report.Report(args, facts)
    old = compare.read(args.compare, KEYS, facts)
    out.say(machine.line(facts))
    timer = timing.Timer(args.device)
    dtypes = list(dict.fromkeys(case.dtype for case in chosen))
    ceilings = machine.ceilings(timer, dtypes)
    trials, once, start = [], {}, time.monotonic()
    for case in chosen:
        base = args.base or next(iter(OPS[case.op].bases))
        if absent.get(base):
            out.say(f"{case.op} is compared with the oracle: {absent[base]}")
            base = "reference"
        trials.append(Trial(case, base=base, backends=args.backend, once=once))
    seconds = min(MOST, BUDGET / len(trials)) if args.seconds is None else args.seconds
    with out.console.status("") as status:
        for turn in range(PASSES):
            turn_start = time.monotonic()
            for i, trial in enumerate(trials):
                status.update(f"pass {turn + 1} of {PASSES}, case {i + 1} of {len(trials)}: {trial.case.op}")
                if turn == 0:
                    trial.check()
                trial.time(timer, seconds / PASSES)
            now = time.monotonic()
            if args.seconds is None and 0 < turn < PASSES - 1 and now + (now - turn_start) > start + LIMIT:
                out.say(f"{turn + 1} of {PASSES} passes: one more would end after {LIMIT:g} s (--seconds sets no limit)\n")
                break
    ceilings = machine.higher(ceilings, machine.ceilings(timer, dtypes))
    facts |= ceilings
    rates = ", ".join(f"GEMM {dtype} {rate:.0f} GFLOP/s" for dtype, rate in ceilings["gemm_gflop_per_s"].items())
    out.say(f"ceilings, measured before and after: copy {ceilings['copy_gb_per_s']:.1f} GB/s, {rates}\n")
    disturbed = sum(trial.disturbed for trial in trials)
    if disturbed:
        out.say(f"{disturbed} of {len(trials)} cases were disturbed: other guests of the host took the cores in most passes\n")
    tables = [list(trial.rows(ceilings)) for trial in trials]
    _widen(itertools.chain(*tables))
    for rows in tables:
        columns = [column for column in COLUMNS if column[0] != "energy" or rows[0]["energy"] is not None]
        out.table(f"{rows[0]['command']}\n{facts['device']}, bound by {rows[0]['bound']}", columns, rows)
    slower = compare.judge(out, old, KEYS, args.compare, lambda row: row["variant"] != row["base"]) if old else 0
    out.write(draw=plot.roofline)
    wrong = [row for row in out.rows if row["check"] not in (None, "ok")]
    if wrong:
        raise CommandError(f"{len(wrong)} of {len(out.rows)} rows fail the check against the oracle and have no speed", code=1)
    compare.refuse(slower, args.compare)
    return 0


def print_list(device):
    for name, op in OPS.items():
        case = Case(name, 0, 0, 0, torch.float32, True, device)
        print(f"{name:24}{device}: {serving(case)[0]:14}bases: {', '.join([*op.bases, 'reference'])}")
    return 0
