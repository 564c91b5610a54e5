"""Pages made from the program itself: every flag, every op, every method, and the measured table. Returns Markdown."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from lowrank_sys import _ops, cli, reference
from lowrank_sys._ops import named_steps
from lowrank_sys.subspace import operators
from lowrank_sys.train.methods import METHODS

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


def table(head: list[str], rows: list[list[object]]) -> str:
    return row(*head) + "|---" * len(head) + "|\n" + "".join(row(*cells) for cells in rows) + "\n"


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every command of `lowrank`, those of `lowrank bench` one by one."""
    for name, (module, summary) in cli.COMMANDS.items():
        parser = cli.Parser(prog=f"lowrank {name}", description=summary)
        importlib.import_module(module).add_arguments(parser)
        yield from _with_its_own(parser)


def _with_its_own(parser):
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser.prog, parser
    for action in below:
        for command in action.choices.values():
            yield from _with_its_own(command)


def flags() -> str:
    """Every flag of every command, from its parser."""
    text = "# Every flag\n\n"
    for prog, parser in parsers():
        text += f"## {prog}\n\n{parser.description or ''}\n\n"
        rows = []
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            name = ", ".join(action.option_strings) or action.dest
            value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
            rows.append([f"`{' '.join(filter(None, (name, str(value))))}`", _help(parser, action)])
        text += table(["flag", "what it does"], rows)
    return text


def _help(parser, action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def ops() -> str:
    """Every op of torch.ops.lowrank: its schema and what the oracle says of it, group by group."""
    text = "# Every op\n\nEach as `torch.ops.lowrank.NAME`. G is a gradient (m, n), B its basis, R the low-rank gradient.\n\n"
    for group in _ops._GROUPS:
        text += f"## {inspect.getdoc(group).splitlines()[0]}\n\n"
        for op, schema in group.SCHEMAS.items():
            text += f"### `{op}`\n\n```\n{op}{schema}\n```\n\n{_said_of(op)}\n\n"
    return text


def _said_of(op: str) -> str:
    if op in named_steps.FORMS:
        named = named_steps.FORMS[op][1]
        basis = " or ".join(named.bases) + (" (G is R already)" if named.projected else "")
        parts = {"weight": named.weight, "basis": basis, "moments": named.moments, "remainder": named.remainder}
        return f"An alias of `{named_steps.served_by(op)}`: " + ", ".join(f"{key} {value}" for key, value in parts.items()) + "."
    function = operators.IMPLEMENTATIONS.get(op) or reference.IMPLEMENTATIONS[op]
    while isinstance(function, functools.partial):
        function = function.func
    return f"```text\n{inspect.getdoc(function)}\n```"


def methods() -> str:
    """Every method of `lowrank train`: its class, what it is, its defaults."""
    text = "# Every method\n\nAs `lowrank train --method NAME`, or the class from `lowrank_sys.optim`. Formulas, "
    text += "bytes of state and papers: "
    text += "[methods](../methods.md). Groups without a rank (embeddings, norms, heads) have the second rate.\n\n"
    for name, method in METHODS.items():
        low_rank = method.low_rank and method.rank is not None
        facts = {"lr": method.lr, "of all else": method.plain_lr, "weights": method.weights}
        if low_rank:
            facts |= {"rank": method.rank, method.scale_key: method.scale, "subspace": method.subspace}
            facts |= {"update_proj_gap": method.update_proj_gap}
        facts |= {**method.keys, **method.options}
        said = ", ".join(f"{key} `{value}`" for key, value in facts.items())
        text += f"## `{name}`\n\n`{method.optimizer.__name__}`: {said}\n\n"
        if method.low_rank:
            text += f"```text\n{inspect.getdoc(method.optimizer)}\n```\n\n"
        else:
            text += "Its groups have no rank: the plain rule on all parameters.\n\n"
    return text


def _rows(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())


# Names of `lowrank bench optimizers` for methods of `lowrank train`.
TIMED = {"galore": "lowrank", "adamw": "adamw-fused"}


def _with_deviation(row: dict) -> str:
    deviation = row["val_loss_deviation"]
    return f"{row['val_loss']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def measured() -> str:
    """Loss, memory and speed of the methods beside each other, from bench/results."""
    quality = {row["method"]: row for row in _rows("quality-llama-1m.json")}
    steps = {row["optimizer"]: row for row in _rows("optimizers-llama-60m.json")}
    rows = []
    for large in sorted(_rows("methods-llama-9m.json"), key=lambda row: row["val_loss"]):
        name = large["method"]
        small = quality.get(name)
        step = steps.get(TIMED.get(name, name))
        rows.append(
            [
                f"`{name}`",
                f"{large['val_loss']:.3f}",
                _with_deviation(small) if small else "",
                f"{large['optimizer_state_bytes'] / 1e6:.1f} MB",
                f"{large['weight_bytes'] / 1e6:.1f} MB",
                f"{1e3 * step['median_s']:.0f} ms" if step else "",
            ]
        )
    head = ["method", "loss, llama-9m", "loss in miniature", "state, llama-9m", "weights, llama-9m", "a step, llama-60m"]
    return table(head, rows)


PAGES = {"reference/flags.md": flags, "reference/ops.md": ops, "reference/methods.md": methods}
TABLES = {"<!-- measured -->": measured}
