"""`lowrank bench floors`: what this package promises of its speed on a CPU, measured; exit 1 on a miss."""

import shlex

from lowrank_sys.bench import machine, report, timing
from lowrank_sys.bench.floors import blockwise, int4, int8, memory, orthogonalize, projected, refresh, roofline, steps
from lowrank_sys.bench.floors.floor import processor_class
from lowrank_sys.cli import CommandError

FLOORS = [
    *steps.FLOORS,
    *int4.FLOORS,
    *refresh.FLOORS,
    *int8.FLOORS,
    *orthogonalize.FLOORS,
    *blockwise.FLOORS,
    *roofline.FLOORS,
    *projected.FLOORS,
    *memory.FLOORS,
]
PEERS = {
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "bitsandbytes",
    "transformers": "transformers",
}


def add_arguments(parser):
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the floors whose line contains one of these (default: all)")
    parser.add_argument(
        "--all", action="store_true", help="also the runs of LLaMA-7B, about an hour and 7 GB of temporary files each"
    )
    parser.add_argument("--list", action="store_true", help="print the floors and measure nothing")
    report.add_output_arguments(parser)


def run(args):
    processor = processor_class()
    chosen = [
        floor.on(processor) for floor in FLOORS if not args.only or any(text.lower() in floor.what.lower() for text in args.only)
    ]
    if not chosen:
        raise CommandError(f"--only {' '.join(args.only)}: in no floor's line; see --list")
    width = max(len(floor.what) for floor in chosen)
    if args.list:
        for floor in chosen:
            print(f"{floor.what:{width}}  {floor.promise}")
        return 0
    for module, package in PEERS.items():
        if why := machine.absent(module, package):
            raise CommandError(why)
    facts = machine.describe("cpu") | {"processor_class": processor}
    out = report.Report(args, facts)
    out.say(f"{machine.line(facts)} | {processor}")
    timer = timing.Timer("cpu")
    for floor in chosen:
        if floor.long and not args.all:
            out.say(f"{floor.what:{width}}  {floor.promise:15} not measured: --all measures it, in about an hour")
            continue
        figure, of = floor.measure(timer) if floor.names else (floor.measure(timer), None)
        holds = floor.holds(figure)
        out.say(
            f"{floor.what:{width}}  {floor.promise:15} {floor.form.format(figure):>9}  {'ok' if holds else 'MISSED'}"
            + (f"  {of}" if of else "")
        )
        out.rows.append(
            {
                "floor": floor.what,
                "promise": floor.promise,
                "limit": floor.limit,
                "figure": figure,
                "of": of,
                "holds": holds,
                "command": shlex.join(["lowrank", "bench", "floors", "--only", floor.what]),
            }
        )
    out.write()
    missed = sum(not row["holds"] for row in out.rows)
    if missed:
        raise CommandError(f"{missed} of {len(out.rows)} floors missed", code=1)
    return 0
