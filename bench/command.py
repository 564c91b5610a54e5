"""`lowrank bench`: its subcommands."""

import argparse

from lowrank_sys.bench import floors, kernels, optimizers, plan, projected, quality, train
from lowrank_sys.bench.device import command as device
from lowrank_sys.bench.static import command as static

COMMANDS = {
    "kernels": (kernels, "time every op against the oracle and against plain torch"),
    "optimizers": (optimizers, "time a whole optimizer step, ours beside galore-torch and torch.optim"),
    "train": (train, "train one model by several methods: loss, memory and speed beside each other"),
    "quality": (quality, "train a miniature by every method, over several seeds: validation losses and their spread"),
    "plan": (plan, "compare what lowrank plan says with what real runs take"),
    "projected": (projected, "measure what layers of project_model save: gradients, activations, the peak of a step"),
    "device": (device, "check and measure a GPU from end to end"),
    "floors": (floors, "measure every promise of speed; exit 1 on a miss"),
}


class Static(argparse.Action):
    """--static takes the rest of the line, by flags of its own, in place of a subcommand."""

    def __call__(self, parser, namespace, values, option_string=None):
        own = type(parser)(prog=f"{parser.prog} --static", description=static.SUMMARY)
        static.add_arguments(own)
        own.parse_args(values, namespace)
        namespace.bench_run = static.run
        self.instead_of.required = False


def add_arguments(parser):
    commands = parser.add_subparsers(dest="bench", required=True, metavar="|".join(COMMANDS))
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(bench_run=module.run)
    flag = parser.add_argument("--static", nargs=argparse.REMAINDER, action=Static, help=static.SUMMARY)
    flag.instead_of = commands


def run(args):
    return args.bench_run(args)
