"""`lowrank bench quality`: what every method reaches in miniature, at its best rate, beside its own absence and a random basis.

Every run is one of `lowrank train`, in the order of the stages below; a run that is in the file of --out is not repeated, so that
a command that was stopped goes on where it was.
"""

import argparse
import math

from lowrank_sys.bench import machine, report, step_times, verdicts
from lowrank_sys.bench.runs import OutOfTime, Runs
from lowrank_sys.cli import CommandError
from lowrank_sys.optim.preset import Method
from lowrank_sys.train.methods import METHODS

# Rates of matrices, of which a method has the five around its default and the next ones where the best is an end; and of all else.
GRID = [float(f"{m}e{e}") for e in range(-7, 1) for m in (1, 2, 5)]
AROUND, MORE = 2, 3
PLAIN = (3e-3, 1e-2)
USUAL_RANK = Method._field_defaults["rank"]
# Flags that this command sets itself.
OWN = (
    "--model", "--method", "--seed", "--out", "--resume", "--lr", "--plain-lr", "--steps", "--rank", "--update-proj-gap",
    "--subspace", "--from",
)  # fmt: skip
# What else the runs have, unless FLAGS say otherwise: a step evaluates and saves nothing.
FLAGS = ["--eval-tokens", "4096", "--eval-steps", "1000000", "--save-steps", "1000000"]


def add_arguments(parser):
    add = parser.add_argument
    add("--model", metavar="NAME", default="llama-1m", help="as for lowrank train (default: %(default)s)")
    add("--methods", metavar="A,B", help=f"of {', '.join(METHODS)} (default: all); adamw and galore are always beside them")
    add("--seeds", metavar="S,T", default="0,1,2", help="of the best rate; the first is that of the grid (default: %(default)s)")
    add("--steps", metavar="N", type=int, default=60, help="optimizer steps of a run (default: %(default)s)")
    add("--rank", metavar="R", type=int, default=64, help=f"of methods whose default is {USUAL_RANK} (default: %(default)s)")
    add("--gap", metavar="N", type=int, default=30, help="the longest gap between refreshes of a basis (default: %(default)s)")
    add("--hours", metavar="H", type=float, default=3.0, help="of all runs in the file; none begins later (default: %(default)s)")
    add("--out", metavar="FILE", default="runs/quality.jsonl", help="a row of each run (default: %(default)s)")
    report.add_output_arguments(parser, plot="the losses less AdamW's of the same seeds")
    add("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="flags of lowrank train, for all runs")


def run(args):
    plan = Plan(args)
    out = report.Report(args, machine.describe("cpu"))
    out.say(machine.line(out.facts))
    runs = Runs(args.out, args.hours, out.say)
    found = {name: {"tried": {}, "own": {}, "frozen": {}, "random": {}} for name in plan.methods}
    try:
        sweep(plan, runs, found)
    except OutOfTime:
        out.say(f"--hours {args.hours:g}: spent; what is missing in the table was not run")
    found = {name: of for name, of in found.items() if "best" in of}
    times = step_seconds(plan, runs, found, out.say)
    rows = verdicts.rows(found, times)
    where = f"{args.model}, {args.steps} steps, rank {args.rank}, longest gap {args.gap}, seeds {args.seeds} {' '.join(plan.flags)}"
    out.table(where.rstrip(), verdicts.COLUMNS, rows)
    out.show("What papers claim, and whether it is so here, over the same seeds", verdicts.CLAIM_COLUMNS, verdicts.claims(found))
    out.write(draw=lambda rows, facts: verdicts.figure(rows, where))
    return 0


class Plan:
    """The settings of all runs, and the flags of one."""

    def __init__(self, args):
        chosen = list(METHODS) if args.methods is None else args.methods.split(",")
        for name in chosen:
            if name not in METHODS:
                raise CommandError(f"--methods: unknown {name!r}; valid: {', '.join(METHODS)}")
        self.methods = [name for name in METHODS if name in {*chosen, *verdicts.PEERS}]
        try:
            self.seeds = [int(seed) for seed in args.seeds.split(",")]
        except ValueError:
            raise CommandError(f"--seeds: got {args.seeds!r}; whole numbers, joined by commas") from None
        for name in ("steps", "rank", "gap"):
            if getattr(args, name) < 1:
                raise CommandError(f"--{name}: got {getattr(args, name)}; it must be at least 1")
        self.flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
        for flag in self.flags:
            if flag.partition("=")[0] in OWN:
                raise CommandError(f"{flag}: lowrank bench quality sets it itself")
        self.model, self.steps, self.rank, self.gap = args.model, args.steps, args.rank, args.gap

    def words(self, method, lr, plain_lr, seed, basis=None):
        """Flags of `lowrank train`. basis: the choice of a basis in place of the method's, with --gap between two of them."""
        own, low_rank = METHODS[method], []
        if own.low_rank and own.rank == USUAL_RANK:
            low_rank = ["--rank", str(self.rank)]
        if own.low_rank and own.rank and (basis or own.update_proj_gap > self.gap):
            low_rank += ["--update-proj-gap", str(self.gap)]
        if basis:
            low_rank += ["--subspace", basis]
        rates = ["--lr", f"{lr:g}", "--plain-lr", f"{plain_lr:g}"]
        start = ["--model", self.model, "--method", method, *rates, "--seed", str(seed), "--steps", str(self.steps)]
        return [*start, *low_rank, *FLAGS, *self.flags]


def loss(row):
    """For comparisons: a run that diverged is worse than any other."""
    return math.inf if row["val_loss"] is None else row["val_loss"]


def sweep(plan, runs, found):
    """All runs, into `found`; those that most depends on first."""
    for name, of in found.items():
        choose(plan, runs, name, of)
    for seed in plan.seeds:
        for name, of in found.items():
            of["own"][seed] = runs(plan.words(name, *of["best"], seed))
    for name, of in found.items():  # a rate of 0 leaves matrices as they are, and all else is trained as ever
        of["frozen"][plan.seeds[0]] = runs(plan.words(name, 0, of["best"][1], plan.seeds[0]))
    bases = {name: random_basis(plan.words(name, *of["best"], plan.seeds[0])) for name, of in found.items()}
    for seed in plan.seeds:
        for name, basis in bases.items():
            if basis:
                found[name]["random"][seed] = runs(plan.words(name, *found[name]["best"], seed, basis))


def choose(plan, runs, name, of):
    """The best plain rate at the middle one of five rates of the grid; then with it the best of the five, or beyond an end."""
    own, seed = METHODS[name], plan.seeds[0]

    def tried(lr, plain_lr):
        of["tried"][lr, plain_lr] = loss(runs(plan.words(name, lr, plain_lr, seed)))
        return of["tried"][lr, plain_lr]

    middle = min(range(AROUND, len(GRID) - AROUND), key=lambda i: abs(math.log(GRID[i] / own.lr)))
    plain_lr = min({own.plain_lr: None, **dict.fromkeys(PLAIN)}, key=lambda rate: tried(GRID[middle], rate))
    losses = {i: tried(GRID[i], plain_lr) for i in range(middle - AROUND, middle + AROUND + 1)}
    for _ in range(MORE):
        best = min(losses, key=losses.get)
        beyond = best - 1 if best == min(losses) else best + 1
        if beyond in losses or not 0 <= beyond < len(GRID):
            break
        losses[beyond] = tried(GRID[beyond], plain_lr)
    of["best"] = GRID[min(losses, key=losses.get)], plain_lr


def random_basis(words):
    """The choice of a basis that owes the gradient nothing, where a method has one and takes another; else None."""
    _, optimizer = step_times.built(words)
    groups = [group for group in optimizer.param_groups if group.get("rank")]
    if not groups or groups[0].get("proj") == "random":
        return None
    able = optimizer.pipeline.subspace.selections()
    return next((name for name in ("random", "uniform") if name in able and groups[0]["subspace"] != name), None)


def step_seconds(plan, runs, found, tell):
    """{method: seconds} of a step at the best rates, all of one process, which are in the file as one row; {} of none."""
    words = {name: plan.words(name, *of["best"], plan.seeds[0]) for name, of in found.items()}
    command = f"step times: {sorted(words.items())}"
    if words and command not in runs.rows:
        tell(f"CPU seconds of a step of {', '.join(words)}")
        runs.keep({"command": command, "seconds": 0, "step_seconds": step_times.measure(words, rounds=2 * plan.gap, warm=5)})
    return runs.rows[command]["step_seconds"] if words else {}
