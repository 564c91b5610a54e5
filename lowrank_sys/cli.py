"""The `lowrank` command. A subcommand's module is imported when it is asked for, so that `--help` waits for no more than
torch, which importing the package costs."""

import argparse
import errno
import importlib
import os
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


def say(line: str) -> None:
    """Print to stderr; a reader that has left is no reason to stop the work."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream) -> None:
    """What is still to be written to `stream`, at the interpreter's exit too, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def main(argv=None) -> int:
    """Run `lowrank ARGV` and return its exit code: 2 for bad input, 1 for a failure, 141 when stdout's reader has left."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        silence(sys.stdout)
        return 141  # as a shell reports SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        silence(sys.stdout)
        say(f"lowrank {' '.join(argv[:1])}: error: cannot write to stdout: {error}")
        return 1


def _run(argv) -> int:
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
        say(f"lowrank {argv[0]}: error: {error}")
        return error.code
    except KeyboardInterrupt:
        say(f"lowrank {argv[0]}: interrupted")
        return 130
