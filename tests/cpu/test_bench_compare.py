"""`lowrank bench` against an older run: what is a regression, and what noise."""

import argparse
import json

import pytest
from benched import quick, run, run_kernels  # noqa: F401

from lowrank_sys.bench import compare, kernels, report


@pytest.fixture
def measured(capsys, tmp_path):
    """A file of a run, and the arguments of that run."""
    argv = ["--op", "project", "--shape", "8x6", "--rank", "2", "--side", "left"]
    path = tmp_path / "old.json"
    assert run_kernels(capsys, *argv, "--json", str(path))[0] == 0
    return path, argv


def _rewritten(path, **changes):
    rows = [row | changes for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "old, spread, verdict, code", [(1e-9, 0.1, "regression", 1), (1e3, 0.1, "faster", 0), (1e-9, 1e12, "noise", 0)]
)
def test_compare(capsys, measured, tmp_path, old, spread, verdict, code):
    path, argv = measured
    _rewritten(path, median_s=old, spread=spread, ratio=None)
    found, out, err = run_kernels(capsys, *argv, "--compare", str(path), "--json", str(tmp_path / "new.json"))
    assert found == code and ("beyond the spreads: 1" in err) == bool(code)  # the base is not ours
    new = json.loads((tmp_path / "new.json").read_text())
    assert [row.get("verdict") for row in new] == [verdict, None, verdict]  # the oracle is not judged
    assert new[0]["new_over_old"] == pytest.approx(new[0]["median_s"] / old) and new[0]["old_s"] == old
    assert "new / old" in out


@pytest.mark.parametrize("others, drift, verdicts", [(8, 1.5, ["noise", "faster"]), (7, 1.0, ["regression", "noise"])])
def test_compare_allows_for_a_machine_that_slows_down(capsys, tmp_path, others, drift, verdicts):
    rows = [{"variant": "C++", "median_s": 1.6, "spread": 0.1}, {"variant": "C++ too", "median_s": 1.05, "spread": 0.1}]
    rows += [{"variant": f"base {i}", "median_s": 1.5, "spread": 0.1} for i in range(others)]
    old = {(row["variant"],): row | {"median_s": 1.0} for row in rows}
    args = argparse.Namespace(json=None, csv=None)
    out = report.Report(args, {})
    out.rows = rows
    slower = compare.judge(out, old, ("variant",), "old.json", lambda row: row["variant"].startswith("C++"))
    assert [row["verdict"] for row in rows[:2]] == verdicts and slower == verdicts.count("regression")
    assert ("took 1.5 times as long" in capsys.readouterr().out) == (drift != 1)
    assert [row["new_over_old"] for row in rows[:2]] == [1.6, 1.05]


@pytest.mark.parametrize(
    "change, before, after, verdict",
    [
        (1.5, 1.0, 1.02, "noise"),
        (1.5, 1.0, 1.4, "regression"),
        (1.5, 1.0, None, "regression"),
        (0.6, 1.0, 0.98, "noise"),
        (0.6, 1.0, 0.7, "faster"),
        (1.0, 1.0, 1.5, "noise"),
    ],
)
def test_a_change_that_the_base_made_too_is_noise(change, before, after, verdict):
    assert compare.verdict(change, {"spread": 0.1, "ratio": after}, {"spread": 0.1, "ratio": before}) == verdict


def test_a_row_has_at_least_the_median_spread():
    rows = [{"spread": spread} for spread in (0.01, 0.1, None, 0.3)]
    kernels._widen(rows)
    assert [row["spread"] for row in rows] == [0.1, 0.1, None, 0.3]


def test_compare_with_another_run_of_the_same(capsys, measured):
    path, argv = measured
    code, out, err = run_kernels(capsys, *argv, "--dtype", "fp32", "bf16", "--compare", str(path))
    assert code in (0, 1) and "2 of 4 rows have no partner" in out


def test_compare_optimizers(capsys, tmp_path):
    path = tmp_path / "old.json"
    argv = ["--shape", "24x16", "--rank", "4", "--steps", "3", "--device", "cpu", "--optimizers", "lowrank,grass,gemms"]
    assert run(capsys, "optimizers", *argv, "--json", str(path))[0] == 0
    _rewritten(path, median_s=1e-9, spread=0.0, ratio=None)
    code, out, err = run(capsys, "optimizers", *argv, "--compare", str(path))
    assert code == 1 and err.count("\n") == 1 and "beyond the spreads: 2" in err
    code, out, err = run(capsys, "optimizers", *argv, "--gap", "7", "--compare", str(path))
    assert code == 2 and "no row in common" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "it is not JSON"),
        ("[]", "it does not hold rows"),
        ('[{"op": "project"}]', "it does not hold rows"),
        (b"\xff\xfe", "it is not JSON"),
    ],
    ids=["half", "empty", "other rows", "bytes"],
)
def test_compare_with_no_rows(capsys, measured, content, message):
    path, argv = measured
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run_kernels(capsys, *argv, "--compare", str(path))
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("field, value", [("device", "Abacus"), ("threads", 99)])
def test_compare_with_another_machine(capsys, measured, field, value):
    path, argv = measured
    _rewritten(path, **{field: value})
    code, out, err = run_kernels(capsys, *argv, "--compare", str(path))
    assert code == 2 and err.count("\n") == 1 and f"the machines differ: {field} was {value}" in err


def test_compare_with_nothing_in_common(capsys, measured):
    path, argv = measured
    _rewritten(path, op="back_project_")
    code, out, err = run_kernels(capsys, *argv, "--compare", str(path))
    assert code == 2 and "no row in common" in err
