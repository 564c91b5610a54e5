"""The `lowrank` command. A subcommand's module is imported when it is asked for, so that `--help` waits for no more than
torch, which importing the package costs."""

import argparse
import importlib
import sys

# name -> (module with add_arguments(parser) and run(args) -> exit code, help)
COMMANDS = {
    "train": ("lowrank_sys.train.command", "pre-train a LLaMA"),
    "plan": ("lowrank_sys.memory.command", "say what a run will need in memory, and whether that fits"),
    "bench": ("lowrank_sys.bench.command", "time kernels and optimizers on this machine"),
    "info": ("lowrank_sys.info", "show versions, devices, and which implementation serves each op"),
}


class CommandError(Exception):
    """Something the user can act on, told in one line."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that lists what is valid."""

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = sorted(flag for action in self._actions for flag in action.option_strings if flag.startswith("--"))
            self.error(f"unknown argument {unknown[0]!r}; valid: {', '.join(flags)}")
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None) -> int:
    """Run `lowrank ARGV` and return its exit code: 2 for bad input, 1 for a failure."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="lowrank", description="Train large language models with low-rank gradients.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            module = importlib.import_module(module)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except SystemExit as stop:
        return stop.code
    except CommandError as error:
        print(f"lowrank {argv[0]}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"lowrank {argv[0]}: interrupted", file=sys.stderr)
        return 130
