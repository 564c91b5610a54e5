"""Plots of `lowrank bench`."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from benched import quick, run, run_kernels  # noqa: F401

from lowrank_sys.bench import plot

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for form, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"plot.{form}"
        run_kernels(capsys, "--op", "project", "refresh_ keys", "--shape", "8x6", "--rank", "2", "--plot", str(path))
        assert path.read_bytes().startswith(start)
        run(
            capsys,
            "optimizers",
            "--shape",
            "24x16",
            "--rank",
            "4",
            "--optimizers",
            "lowrank,gemms",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--plot",
            str(path),
        )
        assert path.read_bytes().startswith(start)


def test_a_plot_without_matplotlib_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run_kernels(capsys, "--op", "project", "--shape", "8x6", "--rank", "2", "--plot", str(tmp_path / "p.png"))
    assert code == 2 and err.count("\n") == 1 and "pip install matplotlib" in err


def test_bars_of_the_roofline_have_every_op_once_by_what_bounds_it():
    rows = json.loads((RESULTS / "rooflines-llama-60m.json").read_text())
    groups = plot._shares(rows)
    assert [title for (title, _), _ in groups] == [*(title for title, _ in plot.BOUNDS.values()), plot.OTHER[0]]
    bars = {name: (group, served) for group, ops in groups for name, served, _ in ops}
    assert sum(len(ops) for _, ops in groups) == len(bars) == len({row["op"] for row in rows})
    assert bars["project"][0] == plot.BOUNDS["products"] and bars["adamw_step"][0] == plot.BOUNDS["bytes"]
    assert bars["refresh_"][0] == plot.OTHER and len(bars["project"][1]) == 6  # three shapes, two sides
    for _, ops in groups:
        medians = [statistics.median(served) for _, served, _ in ops]
        assert medians == sorted(medians, reverse=True)
    first, second = plot._columns(groups)
    assert abs(sum(1 + len(ops) for _, ops in first) - sum(1 + len(ops) for _, ops in second)) <= 6
    axes = plot.roofline(rows, rows[0]).axes
    assert [label.get_text() for ax in axes for label in ax.get_yticklabels()] == [name for _, ops in groups for name, _, _ in ops]
