"""`lowrank bench floors`: what this package promises of its speed on a CPU, measured; exit 1 on a miss."""

from lowrank_sys.bench import machine, report, timing
from lowrank_sys.bench.floors import blockwise, int4, int8, orthogonalize, refresh, steps
from lowrank_sys.cli import CommandError

FLOORS = [*steps.FLOORS, *int4.FLOORS, *refresh.FLOORS, *int8.FLOORS, *orthogonalize.FLOORS, *blockwise.FLOORS]


def add_arguments(parser):
    report.add_output_arguments(parser)


def run(args):
    for package, name in (("galore_torch", "galore-torch"), ("apollo_torch", "apollo-torch"),
                          ("bitsandbytes", "bitsandbytes"), ("transformers", "transformers")):
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
