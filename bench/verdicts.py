"""What the runs of `lowrank bench quality` say: one row a method, the claims of the papers, and bars."""

import statistics

from lowrank_sys.bench import plot, report

PEERS = ("adamw", "galore")
# Whom a paper says to reach a lower loss or perplexity than, and where.
CLAIMS = {
    "apollo": (("adamw", "galore"), "C4, 60M to 1B: 31.55 to 14.20, AdamW 34.06 to 15.56, GaLore 34.88 to 15.64"),
    "apollo-mini": (("adamw", "galore"), "C4, 60M to 1B: 31.93 to 14.17"),
    "fira": (("adamw", "galore"), "C4, 60M to 1B: 31.06 to 14.31"),
    "frugal": (("galore",), "better than concurrent low-rank methods at one budget of memory"),
    "frugal-columns": (("galore",), "the same paper"),
    "sara": (("galore",), "dominant subspaces freeze; sampled ones close a part of the gap to AdamW"),
    "osd": (("galore",), "C4, 60M to 7B: lower perplexity than low-rank baselines"),
    "snsm": (("adamw", "galore"), "C4, 1B: 14.05, tuned AdamW 14.51"),
    "gum": (("adamw", "galore"), "better than GaLore, and than full-parameter training"),
    "lisa": (("adamw",), "fine-tuning to 70B: on par with full training, or better"),
    "grades": (("adamw",), "1.2% more accuracy in fine-tuning"),
    "loqt": (("adamw", "galore"), "C4, 60M to 1B: 33.98 to 15.55"),
    "scale": (("adamw", "galore"), "C4, 7B: 12.59; AdamW 14.61 and GaLore 14.65 in 8 bits"),
}


def finite(runs):
    """{seed: loss}, None if there is a run without."""
    losses = {seed: row.get("val_loss") for seed, row in runs.items()}
    return losses if losses and None not in losses.values() else None


def beyond(these, others):
    """What a method's losses are above others' over the seeds that both have: mean, deviation (None of one seed), and of how many
    seeds they are lower; None without losses."""
    these, others = finite(these), finite(others)
    both = sorted(these.keys() & others.keys()) if these and others else []
    if not both:
        return None
    off = [these[seed] - others[seed] for seed in both]
    return {
        "mean": statistics.fmean(off),
        "deviation": statistics.stdev(off) if len(off) > 1 else None,
        "lower": sum(x < 0 for x in off),
        "seeds": len(off),
    }


def answer(off):
    """Whether it is lower: yes or no where all seeds agree."""
    if off is None:
        return "not run"
    votes = f"{off['lower']} of {off['seeds']}"
    return {0: "no", off["seeds"]: "yes"}.get(off["lower"], "open") + f" ({votes})"


def rows(found, times):
    """A row a method, the lowest mean loss first."""
    adamw = found.get("adamw", {}).get("own", {})
    made = []
    for name, of in found.items():
        losses, states = finite(of["own"]), [row["optimizer_state_bytes"] for row in of["own"].values() if "val_loss" in row]
        made.append(
            {
                "method": name,
                "lr": of["best"][0],
                "plain_lr": of["best"][1],
                "losses": losses,
                "val_loss": statistics.fmean(losses.values()) if losses else None,
                "val_loss_deviation": statistics.stdev(losses.values()) if losses and len(losses) > 1 else None,
                "over_adamw": beyond(of["own"], adamw),
                "over_frozen": beyond(of["own"], of["frozen"]),
                "over_random": beyond(of["own"], of["random"]),
                "random_refused": next((row["refused"] for row in of["random"].values() if "refused" in row), None),
                "optimizer_state_bytes": max(states, default=None),
                "step_seconds": times.get(name),
                "step_over_adamw": times[name] / times["adamw"] if name in times and "adamw" in times else None,
                "tried": [[*rates, loss if loss < 1e300 else None] for rates, loss in of["tried"].items()],
            }
        )
    return sorted(made, key=lambda row: (row["val_loss"] is None, row["val_loss"]))


def _loss(row):
    return f"{row['val_loss']:.4f}" if row["val_loss"] is not None else "diverged or not run"


def _off(key):
    def text(row):
        off = row[key]
        spread = "" if off is None or off["deviation"] is None else f" ± {off['deviation']:.3f}"
        return "" if off is None else f"{off['mean']:+.3f}{spread}"

    return text


def _answered(key):
    """The difference and the answer; nothing where there is no run."""
    return lambda row: "" if row[key] is None else f"{_off(key)(row)}, {answer(row[key])}"


def _random(row):
    return "refused" if row["random_refused"] else _answered("over_random")(row)


COLUMNS = [
    ("method", lambda row: row["method"]),
    ("validation loss, nats a token", _loss),
    ("± of a seed", lambda row: report.number(row["val_loss_deviation"], "{:.4f}")),
    ("over AdamW, same seeds", _off("over_adamw")),
    ("lr", lambda row: f"{row['lr']:g}"),
    ("plain lr", lambda row: f"{row['plain_lr']:g}"),
    ("state", lambda row: report.size(row["optimizer_state_bytes"]) if row["optimizer_state_bytes"] is not None else ""),
    ("step, CPU ms", lambda row: report.number(row["step_seconds"] and 1e3 * row["step_seconds"], "{:.2f}")),
    ("of AdamW's", lambda row: report.number(row["step_over_adamw"], "{:.2f}")),
    ("over itself with frozen matrices", _answered("over_frozen")),
    ("over itself on a random basis", _random),
]

CLAIM_COLUMNS = [
    ("method", lambda row: row["method"]),
    ("claims less than", lambda row: row["peer"]),
    ("here", lambda row: answer(row["off"])),
    ("over it, same seeds", _off("off")),
    ("the claim", lambda row: row["claim"]),
]


def claims(found):
    return [
        {"method": name, "peer": peer, "off": beyond(found[name]["own"], found.get(peer, {}).get("own", {})), "claim": words}
        for name, (peers, words) in CLAIMS.items()
        if name in found
        for peer in peers
    ]


def figure(rows, title):
    """Bars of the loss less AdamW's, with the deviation over the seeds."""
    rows = [row for row in reversed(rows) if row["over_adamw"] is not None]
    drawn = plot.figure(8, 1.5 + 0.25 * len(rows))
    axes = drawn.subplots()
    off = [row["over_adamw"] for row in rows]
    colors = ["tab:green" if o["lower"] == o["seeds"] else "tab:red" if o["lower"] == 0 else "tab:gray" for o in off]
    axes.barh(
        [row["method"] for row in rows], [o["mean"] for o in off], xerr=[o["deviation"] or 0 for o in off], color=colors, capsize=2
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="validation loss less AdamW's of the same seeds, nats (green: lower with every seed, gray: with some)")
    axes.grid(alpha=0.3, axis="x")
    drawn.suptitle(title, fontsize=8)
    return drawn
