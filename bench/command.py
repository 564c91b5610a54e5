"""`lowrank bench`: its subcommands."""

from lowrank_sys.bench import floors, kernels, optimizers

COMMANDS = {
    "kernels": (kernels, "time every op against the oracle and against plain torch"),
    "optimizers": (optimizers, "time a whole optimizer step, ours beside galore-torch and torch.optim"),
    "floors": (floors, "measure every promise of speed; exit 1 on a miss"),
}


def add_arguments(parser):
    commands = parser.add_subparsers(dest="bench", required=True, metavar="|".join(COMMANDS))
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(bench_run=module.run)


def run(args):
    return args.bench_run(args)
