"""Plots of the benchmark's rows."""

import io
import statistics

from lowrank_sys.cli import CommandError

# What bounds an op, and how the roofline plot says so; all other work has no such bound.
BOUNDS = {
    "products": ("products: share of the rate of a GEMM", "tab:blue"),
    "products of bytes": ("products in INT8: share of the fp32 rate", "tab:purple"),
    "bytes": ("bytes: share of the bandwidth of a copy", "tab:orange"),
}
OTHER = ("other work: share of what its bytes and products would take", "tab:gray")


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


def _shares(rows):
    """[(group of BOUNDS or OTHER, [(op, shares of its shapes and sides, the base's)])], highest median first."""
    groups = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op and row["roofline"] and row["variant"] != "reference"]
        if served := [row["roofline"] for row in own if row["check"]]:
            base = [row["roofline"] for row in own if not row["check"]]
            group = BOUNDS.get(next(row["bound"] for row in own), OTHER)
            groups.setdefault(group, []).append((op, served, base))
    order = [group for group in (*BOUNDS.values(), OTHER) if group in groups]
    return [(group, sorted(groups[group], key=lambda op: -statistics.median(op[1]))) for group in order]


def _columns(groups):
    """`groups` in two columns whose lines are as equal in number as whole groups allow."""
    lines = [1 + len(ops) for _, ops in groups]
    first = min(range(1, len(groups) + 1), key=lambda count: max(sum(lines[:count]), sum(lines[count:])))
    return [column for column in (groups[:first], groups[first:]) if column]


def roofline(rows, facts):
    """A bar an op: the share of the measured ceiling that bounds it, the median over shapes and sides and a dot for each, and the
    base's median as a stroke."""
    columns = _columns(_shares(rows))
    most = max(sum(1 + len(ops) for _, ops in column) for column in columns)
    drawn = figure(6.5 * len(columns), 1.3 + 0.24 * most)
    for axes, column in zip(drawn.subplots(1, len(columns), squeeze=False)[0], columns):
        y, names = 0, {}
        for (title, color), ops in column:
            axes.text(0, y, title, va="center", fontsize=9, weight="bold")
            for op, served, base in ops:
                y += 1
                names[y] = op
                axes.barh(y, statistics.median(served), height=0.7, color=color, alpha=0.75)
                axes.plot(served, [y] * len(served), ".", color="black", markersize=2.5, alpha=0.6)
                if base:
                    axes.plot([statistics.median(base)] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.6)
                axes.text(1.42, y, f"{statistics.median(served):.0%}", va="center", ha="right", fontsize=8)
            y += 1
        axes.axvline(1, color="gray", linestyle="--", linewidth=0.8)
        axes.set(xlim=(0, 1.44), ylim=(max(most, y) - 0.3, -0.7))  # the first line is on top; columns have lines of one height
        axes.set_yticks(list(names), list(names.values()), fontsize=8)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, axis="x")
    ceilings = ", ".join(f"GEMM {dtype} {rate:.0f} GFLOP/s" for dtype, rate in facts["gemm_gflop_per_s"].items())
    said = "bar: median over shapes and sides, dots: each of them, stroke: the base, plain torch"
    drawn.suptitle(f"{_machine(facts)}\ncopy {facts['copy_gb_per_s']:.1f} GB/s, {ceilings}; {said}", fontsize=9)
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
