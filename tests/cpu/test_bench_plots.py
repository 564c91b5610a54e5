"""Plots of `lowrank bench`."""

import sys

import pytest
from benched import quick, run, run_kernels  # noqa: F401


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
