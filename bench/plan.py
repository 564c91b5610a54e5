"""`lowrank bench plan`: what `lowrank plan` says beside what a real run takes, of tensors and of the process."""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from lowrank_sys.bench import machine, report
from lowrank_sys.cli import CommandError
from lowrank_sys.train import flags

LOWRANK = "import sys; from lowrank_sys import cli; sys.exit(cli.main())"
COUNT = "import sys; from lowrank_sys.bench import plan; print(plan.counted(sys.argv[1:]))"
# Flags that this command sets itself.
OWN = ("--model", "--out", "--steps", "--resume", "--device")


def add_arguments(parser):
    parser.add_argument("--models", metavar="A,B", default="llama-60m", help="as --model of lowrank train (default: %(default)s)")
    report.add_output_arguments(parser)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="flags of lowrank train, for all models")


def run(args):
    flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    for flag in flags:
        if flag.partition("=")[0] in OWN:
            raise CommandError(f"{flag}: lowrank bench plan sets it itself")
    out = report.Report(args, machine.describe("cpu"))
    out.say(machine.line(out.facts))
    rows = [_row(out, ["--model", model, "--steps", "2", "--device", "cpu", *flags]) for model in args.models.split(",")]
    out.table(f"two steps of lowrank train {' '.join(flags)}".rstrip(), COLUMNS, rows)
    out.write()
    return 0


def _against(planned, real):
    return lambda row: f"{report.size(row[planned])} / {report.size(row[real])} = {row[planned] / row[real]:.3f}"


COLUMNS = [
    ("model", lambda row: row["model"]),
    ("peak of tensors: planned / counted", _against("tensor_peak_bytes", "counted_tensor_peak_bytes")),
    ("peak of the process: planned / VmHWM", _against("peak_bytes", "real_peak_bytes")),
]


def _row(out, words):
    """Plan, run, and run once more under a dispatch mode that counts storages, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", *words, "--out", str(Path(folder) / "run")]
        out.say(shlex.join(["lowrank", *train]))
        plan = json.loads(_said(LOWRANK, "plan", *words, "--json"))
        _said(LOWRANK, *train)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return {
        "model": plan["model"],
        "tensor_peak_bytes": plan["tensor_peak_bytes"],
        "counted_tensor_peak_bytes": int(_said(COUNT, *words)),
        "peak_bytes": plan["peak_bytes"],
        "real_peak_bytes": summary["peak_memory_bytes"],
        "allocator_tight": plan["allocator_tight"],
        "command": shlex.join(["lowrank", "train", *words]),
    }


def _said(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CommandError(f"{shlex.join(words)} ended with code {done.returncode}", code=1)
    return done.stdout


def counted(words):
    """Peak of live tensors over two real steps of `lowrank train` with these flags, in bytes."""
    from lowrank_sys.memory.rehearsal import rehearse

    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(words)
    flags.check(args)
    args.dtype = "fp32" if args.dtype == "auto" else args.dtype
    return rehearse(args, fake=False).peak
