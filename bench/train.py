"""`lowrank bench train`: methods beside each other on one model: loss, state, memory and speed, in a table and a plot.

Every run is `lowrank train` in a process of its own, so that its peak of memory is its own; a run whose summary is there is not
repeated.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from lowrank_sys.bench import machine, plot, report
from lowrank_sys.cli import CommandError
from lowrank_sys.train.methods import METHODS

LOWRANK = "import sys; from lowrank_sys import cli; sys.exit(cli.main())"
# Flags that this command sets itself.
OWN = ("--model", "--method", "--seed", "--out", "--resume")


def add_arguments(parser):
    add = parser.add_argument
    add("--model", metavar="NAME", default="llama-9m", help="as for lowrank train (default: %(default)s)")
    add("--methods", metavar="A,B", help=f"of {', '.join(METHODS)} (default: all)")
    add("--seeds", metavar="S,T", default="0", help="a run for each (default: %(default)s)")
    add("--out", metavar="DIR", default="runs/bench", help="a folder for each run goes here (default: %(default)s)")
    report.add_output_arguments(parser, plot="validation loss against tokens and against memory")
    add("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="flags of lowrank train, for all runs")


def run(args):
    methods = list(METHODS) if args.methods is None else args.methods.split(",")
    for method in methods:
        if method not in METHODS:
            raise CommandError(f"--methods: unknown {method!r}; valid: {', '.join(METHODS)}")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise CommandError(f"--seeds: got {args.seeds!r}; whole numbers, joined by commas") from None
    flags = args.flags[1:] if args.flags[:1] == ["--"] else args.flags
    for flag in flags:
        if flag.partition("=")[0] in OWN:
            raise CommandError(f"{flag}: lowrank bench {args.bench} sets it itself")
    out = report.Report(args, machine.describe("cpu"))
    out.say(machine.line(out.facts))
    runs = {method: [_train(out, Path(args.out), args.model, method, seed, flags) for seed in seeds] for method in methods}
    rows = [_row(method, [summary for summary, _ in pairs]) for method, pairs in runs.items()]
    rows.sort(key=lambda row: row["val_loss"])
    first = next(iter(runs.values()))[0][0]
    title = f"{args.model}, {first['tokens']:,} tokens, seeds {args.seeds}: lowrank bench {args.bench} "
    title = (title + " ".join(flags)).rstrip()
    out.table(title, COLUMNS, rows)
    out.write(draw=lambda rows, facts: _figure(runs, rows, title))
    return 0


COLUMNS = [
    ("method", lambda row: row["method"]),
    ("validation loss, nats a token", lambda row: f"{row['val_loss']:.4f}"),
    ("± of a seed", lambda row: report.number(row["val_loss_deviation"], "{:.4f}")),
    ("lr", lambda row: f"{row['lr']:g}"),
    ("plain lr", lambda row: f"{row['plain_lr']:g}"),
    ("state", lambda row: report.size(row["optimizer_state_bytes"])),
    ("weights", lambda row: report.size(row["weight_bytes"])),
    ("peak memory", lambda row: report.size(row["training_peak_memory_bytes"])),
    ("tokens/s", lambda row: report.number(row["tokens_per_second"], "{:,.0f}")),
]


def _train(out, folder, model, method, seed, flags):
    """(summary, rows of metrics.jsonl) of one run."""
    folder = folder / f"{Path(model).stem}-{method}-{seed}"
    argv = ["train", "--model", model, "--method", method, "--seed", str(seed), "--out", str(folder), *flags, "--resume"]
    command, summary = shlex.join(["lowrank", *argv]), folder / "summary.json"
    if not summary.exists():
        out.say(command)
        code = subprocess.run([sys.executable, "-c", LOWRANK, *argv], stdout=subprocess.DEVNULL).returncode
        if code:
            raise CommandError(f"{command} ended with code {code}", code=1)
    found = json.loads(summary.read_text())
    if found["command"] != command:
        raise CommandError(f"--out: {folder} holds another run, {found['command']}; choose another --out")
    return found, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _row(method, summaries):
    def mean(key):
        values = [summary[key] for summary in summaries]
        return None if None in values else statistics.fmean(values)

    losses = [summary["val_loss"] for summary in summaries]
    if None in losses:
        raise CommandError("--eval-tokens 0: the methods are compared by their validation losses; it must be at least 1")
    return {
        "method": method,
        "val_loss": mean("val_loss"),
        "val_loss_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "lr": summaries[0]["arguments"]["lr"],
        "plain_lr": summaries[0]["arguments"]["plain_lr"],
        "optimizer_state_bytes": int(mean("optimizer_state_bytes")),
        "weight_bytes": summaries[0]["memory"]["weights"],
        "training_peak_memory_bytes": int(mean("training_peak_memory_bytes")),
        "tokens_per_second": mean("tokens_per_second"),
        "seeds": [summary["seed"] for summary in summaries],
        "losses": losses,
        "commands": [summary["command"] for summary in summaries],
    }


def _figure(runs, rows, title):
    figure = plot.figure(12, 5)
    from matplotlib import colormaps

    curves, points = figure.subplots(1, 2)
    # the ten strong colours of the palette, then the ten light ones
    colors = {row["method"]: colormaps["tab20"](2 * i % 20 + i // 10) for i, row in enumerate(rows)}
    for row in rows:
        method = row["method"]
        for i, (summary, steps) in enumerate(runs[method]):
            each = summary["tokens"] / summary["steps"]
            seen = [(step["step"] * each, step["val_loss"]) for step in steps if step["val_loss"] is not None and step["step"]]
            curves.plot(*zip(*seen), color=colors[method], marker=".", label=None if i else method)
        points.plot(row["optimizer_state_bytes"] / 2**20, row["val_loss"], "o", color=colors[method])
        points.annotate(
            method, (row["optimizer_state_bytes"] / 2**20, row["val_loss"]), textcoords="offset points", xytext=(5, 3), fontsize=8
        )
    curves.set(xlabel="tokens", ylabel="validation loss (nats a token)")
    points.set(xlabel="optimizer state (MiB)", ylabel="validation loss (nats a token)")
    curves.legend(fontsize=8)
    for axes in (curves, points):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    return figure
