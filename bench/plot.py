"""Plots of the benchmark's rows."""

import io
import math

from lowrank_sys.cli import CommandError

# How many times as high as the next one below it a name of the roofline plot stands at least.
LINE = 1.22


def figure(width, height):
    """An empty figure, of matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(f"--plot: matplotlib is not installed ({error}): pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def check(path):
    """Whether matplotlib is there and writes what the name of `path` ends on."""
    known = figure(1, 1).canvas.get_supported_filetypes()
    if form(path) not in known:
        raise CommandError(f"--plot {path}: unknown format; valid: {', '.join(f'.{name}' for name in sorted(known))}")


def form(path):
    return path.suffix.lstrip(".").lower() or "png"


def encoded(drawn, path):
    """The bytes of a figure, in the format that the name of `path` ends on."""
    file = io.BytesIO()
    drawn.savefig(file, format=form(path), dpi=120)
    return file.getvalue()


def _machine(facts):
    return f"{facts['device']}, {facts['cores']} cores, torch {facts['torch']}, lowrank-sys {facts['lowrank_sys']}"


def roofline(rows, facts):
    """GFLOP/s against FLOP a byte, a point a timed row, the fastest of each op by name; the ceilings are the measured ones."""
    drawn = figure(11, 7)
    axes = drawn.subplots()
    rows = [row for row in rows if row["gflop_per_s"]]
    at = {id(row): row["gflop_per_s"] / row["gb_per_s"] for row in rows}
    served = [row for row in rows if row["check"] and row["variant"] != "reference"]
    groups = {
        "served": served,
        "reference": [row for row in rows if row["variant"] == "reference"],
        "base": [row for row in rows if not row["check"]],
    }
    for (name, group), marker in zip(groups.items(), "o.x"):
        axes.plot([at[id(row)] for row in group], [row["gflop_per_s"] for row in group], marker, label=name, alpha=0.4)
    best = {}  # op -> its fastest row, where the name goes
    for row in served:
        best[row["op"]] = max(row, best.get(row["op"], row), key=lambda r: r["gflop_per_s"])
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte, counted", ylabel="GFLOP/s", title=_machine(facts))
    below = math.inf
    for row in sorted(best.values(), key=lambda row: -row["gflop_per_s"]):
        below = min(row["gflop_per_s"], below / LINE)  # names one under the other where points lie together
        axes.plot(at[id(row)], row["gflop_per_s"], "o", color="tab:blue")
        axes.annotate(
            f"{row['op']} {row['roofline']:.0%}",
            (at[id(row)], row["gflop_per_s"]),
            (1.02, below),
            textcoords=("axes fraction", "data"),
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "gray", "alpha": 0.3, "linewidth": 0.5},
        )
    copy = facts["copy_gb_per_s"]
    for i, (dtype, rate) in enumerate(facts["gemm_gflop_per_s"].items()):
        left, right = min([*at.values(), 0.1]), max([*at.values(), 2 * rate / copy])
        axes.plot(
            [left, rate / copy, right],
            [copy * left, rate, rate],
            "k",
            linestyle=("-", "--", ":")[i % 3],
            label=f"copy {copy:.1f} GB/s, GEMM {dtype} {rate:.0f} GFLOP/s",
        )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawn


def bars(rows, facts):
    """A step of each optimizer from p20 to p80, and the bytes of its state."""
    drawn = figure(12, 1.5 + 0.35 * len(rows))
    steps, states = drawn.subplots(1, 2, sharey=True)
    rows = sorted(rows, key=lambda row: -row["median_s"])
    names, medians = [row["optimizer"] for row in rows], [1e3 * row["median_s"] for row in rows]
    off = [
        [medians[i] - 1e3 * row["p20_s"] for i, row in enumerate(rows)],
        [1e3 * row["p80_s"] - medians[i] for i, row in enumerate(rows)],
    ]
    steps.barh(names, medians, xerr=off)
    states.barh(names, [row["state_bytes"] / 2**20 for row in rows], color="tab:orange")
    steps.set(xlabel="ms a step, median, p20 to p80")
    states.set(xlabel="state (MiB)")
    for axes in (steps, states):
        axes.grid(alpha=0.3, axis="x")
    drawn.suptitle(_machine(facts))
    return drawn
