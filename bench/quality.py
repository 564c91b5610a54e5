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
from lowrank_sys.optim.rules import Adam
from lowrank_sys.train.methods import METHODS

# Rates of matrices.
GRID = [float(f"{m}e{e}") for e in range(-7, 1) for m in (1, 2, 5)]
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
    add("--steps", metavar="N", type=int, default=100, help="optimizer steps of a run (default: %(default)s)")
    add("--rank", metavar="R", type=int, default=64, help=f"of methods whose default is {USUAL_RANK} (default: %(default)s)")
    add(
        "--plain-lr",
        metavar="LR",
        type=float,
        default=1e-2,
        help="of all that is no matrix where Adam trains it; others have their method's (default: %(default)s)",
    )
    add("--rates", metavar="N", type=int, default=5, choices=(3, 5, 7), help="of matrices, at least (default: %(default)s)")
    add("--gap", metavar="N", type=int, default=50, help="the longest gap between refreshes of a basis (default: %(default)s)")
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
    where = f"{args.model}, {args.steps} steps, rank {args.rank}, longest gap {args.gap}, {args.rates} rates, seeds {args.seeds} "
    where = (where + " ".join(plan.flags)).rstrip()
    out.table(where, verdicts.COLUMNS, rows)
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
        self.plain, self.rates = args.plain_lr, args.rates

    def plain_lr(self, method):
        own = METHODS[method]
        _, optimizer = step_times.built(self.words(method, own.lr, own.plain_lr, self.seeds[0]))
        return self.plain if isinstance(optimizer.pipeline.plain, Adam) else own.plain_lr

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
    """All runs, into `found`: rates, then seed by seed all that is compared, so that a sweep which is cut short has whole seeds."""
    first, bases, absent = plan.seeds[0], {}, {}
    for name, of in found.items():
        choose(plan, runs, name, of)
        bases[name] = random_basis(plan.words(name, *of["best"], first))
    for seed in plan.seeds:
        for name, of in found.items():
            of["own"][seed] = runs(plan.words(name, *of["best"], seed))
        for name, of in found.items():
            if seed == first:
                of["frozen"][seed] = runs(absent.setdefault(rest(plan, name), plan.words(name, 0, of["best"][1], seed)))
            if bases[name]:
                of["random"][seed] = runs(plan.words(name, *of["best"], seed, bases[name]))


def choose(plan, runs, name, of):
    """The best of --rates rates around the default, and of the next ones of the grid as long as the best is an end."""
    plain_lr, seed, aside = plan.plain_lr(name), plan.seeds[0], plan.rates // 2

    def tried(i):
        of["tried"][GRID[i], plain_lr] = loss(runs(plan.words(name, GRID[i], plain_lr, seed)))
        return of["tried"][GRID[i], plain_lr]

    middle = min(range(aside, len(GRID) - aside), key=lambda i: abs(math.log(GRID[i] / METHODS[name].lr)))
    losses = {i: tried(i) for i in range(middle - aside, middle + aside + 1)}
    while True:
        best = min(losses, key=losses.get)
        beyond = best - 1 if best == min(losses) else best + 1
        if beyond in losses or not 0 <= beyond < len(GRID):
            break
        losses[beyond] = tried(beyond)
    of["best"] = GRID[best], plain_lr


def rest(plan, name):
    """What decides a run whose matrices are frozen: methods that train all else alike have the same one."""
    _, optimizer = step_times.built(plan.words(name, 0, plan.plain_lr(name), plan.seeds[0]))
    pipeline, group = optimizer.pipeline, optimizer.param_groups[0]
    parts = [type(part).__name__ for part in (pipeline.plain, pipeline.moments, pipeline.schedule)]
    hyper = {key: group[key] for key in (*pipeline.plain.defaults, "lr", "weight_decay") if key in group}
    return repr((parts, vars(pipeline.schedule), hyper, len(group["params"]), METHODS[name].weights))


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
        runs.keep({"command": command, "seconds": 0, "step_seconds": step_times.measure(words, rounds=10, warm=2)})
    return runs.rows[command]["step_seconds"] if words else {}
