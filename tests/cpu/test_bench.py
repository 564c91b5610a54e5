"""`lowrank bench`: flags, files, the check that stands before every speed, and the arithmetic of the figures."""

import argparse
import csv
import itertools
import json
import sys

import pytest
import torch

from lowrank_sys import backends, cli
from lowrank_sys._ops import named_steps
from lowrank_sys.bench import compare, floors, kernels, machine, optimizers, plot, quality, report, shapes, timing, train
from lowrank_sys.bench.cases import OPS, make, serving
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors import floor, memory, roofline
from lowrank_sys.bench.floors.floor import Floor

CEILINGS = {"copy_gb_per_s": 10.0, "gemm_gflop_per_s": {"float32": 100.0, "bfloat16": 100.0, "float16": 100.0}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_largest_cache", lambda: 0)
    monkeypatch.setattr(timing, "LEAST_FILL", 1 << 10)
    monkeypatch.setattr(timing._Stolen, "_seconds", lambda self: 0.0)
    monkeypatch.setattr(optimizers, "OVERHEAD_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "PASSES", 2)
    monkeypatch.setattr(machine, "ceilings", lambda timer, dtypes: dict(CEILINGS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys, *argv):
    code = cli.main(["bench", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def run_kernels(capsys, *argv):
    return run(capsys, "kernels", "--device", "cpu", "--seconds", "0", *argv)


def test_every_op_gives_rows_with_all_fields(capsys, tmp_path):
    path = tmp_path / "rows.json"
    code, out, err = run_kernels(capsys, "--shape", "33x20", "--rank", "4", "--json", str(path))
    assert (code, err) == (0, "")
    rows = json.loads(path.read_text())
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row["shape"] == "33x20" and row["device"] and row["torch"] == torch.__version__
        assert {"commit", "threads", "copy_gb_per_s", "gemm_gflop_per_s", "p20_s", "p80_s", "roofline"} <= row.keys()
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["command"] in out
        assert row["command"].startswith(f"lowrank bench kernels --op {row['op']} --shape 33x20")
        is_base = row["variant"] == row["base"]
        assert (row["ratio"] is None) == is_base and (row["noise"] is None) == (is_base or row["samples"] == 1)
        assert (row["check"] is None) == is_base and row["check"] in (None, "ok")
    assert rows[0]["device"] in out
    assert not list(tmp_path.glob(".*"))


def test_no_op_is_missing():
    timed = {op.overload for op in OPS.values()}
    timed |= {named_steps.served_by(op) for op in timed & named_steps.FORMS.keys()}  # what an alias calls
    assert {op.partition(".")[0] for op in timed} == {row.op.partition(".")[0] for row in backends.table()}
    assert {op.overload for op in OPS.values()} <= {row.op for row in backends.table()}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_op_passes_its_check_in_low_precision(capsys, dtype):
    code, out, err = run_kernels(capsys, "--shape", "65x48", "--rank", "8", "--dtype", dtype)
    assert (code, err) == (0, "")


def test_csv_has_the_same_rows(capsys, tmp_path):
    paths = tmp_path / "rows.csv", tmp_path / "rows.json"
    run_kernels(capsys, "--op", "project", "--shape", "8x6", "--rank", "2", "--csv", str(paths[0]), "--json", str(paths[1]))
    rows = list(csv.DictReader(paths[0].open()))
    assert [row["variant"] for row in rows] == [row["variant"] for row in json.loads(paths[1].read_text())]
    assert float(rows[0]["gemm_gflop_per_s.float32"]) == 100.0


@pytest.mark.parametrize(
    "op, wrong",
    [
        ("project", lambda grad, basis, *, left: 1.01 * torch.ops.lowrank.project(grad, basis, left=left)),
        ("project", lambda grad, basis, *, left: torch.ops.lowrank.project(grad, basis, left=left).fill_(torch.nan)),
        ("galore_step", lambda *tensors, **hyper: None),
        ("subspace_iteration", lambda grad, basis, **arguments: (basis, torch.ones(basis.shape[1]))),
        ("subspace_iteration", lambda grad, basis, **arguments: (2 * basis, torch.ones(basis.shape[1]))),
    ],
    ids=["a percent off", "nan", "does nothing", "an old basis", "not orthonormal"],
)
def test_a_wrong_kernel_gets_no_speed(capsys, monkeypatch, tmp_path, op, wrong):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(kernels, "serving", lambda case: ("broken", wrong))
    code, out, err = run_kernels(capsys, "--op", op, "--shape", "40x30", "--rank", "4", "--json", str(path))
    assert code == 1
    assert err.count("\n") == 1 and "fail the check" in err
    broken, others = [], []
    for row in json.loads(path.read_text()):
        (broken if row["variant"] == "broken" else others).append(row)
    assert all(row["check"].startswith("wrong") and row["median_s"] is None and row["gb_per_s"] is None for row in broken)
    assert all(row["median_s"] > 0 for row in others)
    assert "wrong" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shape", "12"], "not MxN"),
        (["--shape", "12x0"], "not MxN"),
        (["--shape", "8x6", "--rank", "7"], "--rank 7 is too large for shape 8x6: at most 6"),
        (["--rank", "0"], "not a positive integer"),
        (["--op", "project", "--base", "svd"], "valid: reference, gemm"),
        (["--dtype", "fp8"], "'fp32', 'bf16', 'fp16'"),
        (["--model", "gpt-2"], "'llama-60m'"),
        (["--device", "tpu"], "valid: cpu"),
        (["--op", "projekt"], "invalid choice: 'projekt'"),
        (["--seconds", "-1"], "not a number of seconds"),
        (["--op", "project", "--backend", "triton"], "--backend triton: serves none of these ops on cpu"),
        (["--json", "missing/rows.json"], "missing/rows.json"),
        (["--csv", "."], "cannot write"),
        (["--plot", "missing/plot.png"], "missing/plot.png"),
        (["--plot", "plot.xyz"], "--plot plot.xyz: unknown format; valid: ."),
        (["--compare", "missing/old.json"], "missing/old.json: cannot read it"),
    ],
    ids=" ".join,
)
def test_bad_input(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "kernels", *argv)
    assert code == 2
    assert err.count("\n") == 1 and message in err


def test_backends_are_chosen_by_name(capsys, tmp_path):
    path = tmp_path / "rows.json"
    argv = ["--op", "project", "--shape", "8x6", "--rank", "2", "--side", "left", "--json", str(path)]
    for backend in ("reference", "cpu"):
        assert run_kernels(capsys, *argv, "--backend", backend)[0] == 0
        rows = json.loads(path.read_text())
        assert [row["backend"] for row in rows] == [backend, None] and [row["base"] for row in rows] == ["gemm", "gemm"]


def test_a_slow_oracle_is_timed_once():
    trial = kernels.Trial(Case("project", 8, 6, 2, torch.float32, True, "cpu"))
    trial.check()
    for _ in range(3):
        trial.time(timing.Timer("cpu"), seconds=0)
    assert {name: len(passes) for name, passes in trial.passes.items()} == {serving(trial.case)[0]: 3, "reference": 1, "gemm": 3}
    spreads = {row["variant"]: row["spread"] for row in trial.rows(CEILINGS)}
    assert spreads.pop("reference") is None and min(spreads.values()) > 0


@pytest.mark.parametrize("limit, passes", [(0.0, 2), (1e9, 3)])
def test_a_pass_that_would_end_late_is_left_out(capsys, monkeypatch, tmp_path, limit, passes):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(kernels, "PASSES", 3)
    monkeypatch.setattr(kernels, "BUDGET", 0.0)
    monkeypatch.setattr(kernels, "LIMIT", limit)
    argv = ["--device", "cpu", "--op", "project", "--shape", "8x6", "--rank", "2", "--side", "left", "--json", str(path)]
    code, out, err = run(capsys, "kernels", *argv)
    assert code == 0 and ("2 of 3 passes" in out) == (passes == 2)
    assert {row["samples"] for row in json.loads(path.read_text()) if row["variant"] != "reference"} == {kernels.ROUNDS * passes}


def test_kernels_without_bitsandbytes(capsys, monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    monkeypatch.setitem(kernels.PACKAGES, "bitsandbytes", ("nonexistent_module", "bitsandbytes"))
    argv = ["--op", "quantize_blockwise", "--shape", "8x6", "--json", str(path)]
    code, out, err = run_kernels(capsys, *argv)
    assert code == 0 and "pip install bitsandbytes" in out
    assert {row["base"] for row in json.loads(path.read_text())} == {"reference"}
    code, out, err = run_kernels(capsys, *argv, "--base", "bitsandbytes")
    assert code == 2 and err.count("\n") == 1 and "pip install bitsandbytes" in err


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


def test_the_roofline_is_drawn_from_the_rows():
    pytest.importorskip("matplotlib")
    row = {"op": "project", "variant": "C++", "check": "ok", "gb_per_s": 2.0, "gflop_per_s": 50.0, "roofline": 0.5}
    rows = [row, row | {"gflop_per_s": 40.0}, row | {"op": "back_project_", "gflop_per_s": 49.0}]
    (axes,) = plot.roofline(rows, {**CEILINGS, **machine.describe("cpu")}).axes
    served = axes.lines[0].get_xydata().tolist()
    assert served == [[25.0, 50.0], [20.0, 40.0], [24.5, 49.0]]
    ceiling = axes.lines[-1].get_xydata()
    assert ceiling[1].tolist() == [10.0, 100.0] and ceiling[2][1] == 100.0  # 100 GFLOP/s from 10 FLOP a byte on
    assert [text.get_text() for text in axes.texts] == ["project 50%", "back_project_ 50%"]
    assert axes.texts[1].xyann[1] <= 50.0 / plot.LINE < 49.0  # its name has a line of its own


def test_a_plot_without_matplotlib_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run_kernels(capsys, "--op", "project", "--shape", "8x6", "--rank", "2", "--plot", str(tmp_path / "p.png"))
    assert code == 2 and err.count("\n") == 1 and "pip install matplotlib" in err


def test_list_names_every_op_and_its_bases(capsys):
    code, out, _ = run(capsys, "kernels", "--list")
    assert code == 0
    for line, (name, op) in zip(out.splitlines(), OPS.items()):
        assert line.startswith(name) and all(base in line for base in op.bases)


def test_cases_of_a_model_are_its_distinct_shapes():
    parser = cli.Parser()
    kernels.add_arguments(parser)
    args = parser.parse_args(["--op", "project", "adamw_step", "--model", "llama-60m", "--rank", "64", "128"])
    found = [(c.op, c.m, c.n, c.rank, c.left) for c in kernels.cases(args)]
    sizes = [(512, 512), (1376, 512), (512, 1376)]
    assert found == (
        [("project", m, n, r, left) for m, n in sizes for r in (64, 128) for left in (True, False)]
        + [("adamw_step", m, n, None, None) for m, n in sizes]
    )


def test_matrices_of_models():
    assert list(shapes.matrices("llama-70b")[:7]) == [
        (8192, 8192),
        (1024, 8192),
        (1024, 8192),
        (8192, 8192),
        (28672, 8192),
        (28672, 8192),
        (8192, 28672),
    ]
    assert len(shapes.matrices("llama-65b")) == 7 * 80 and (17920, 6656) in shapes.matrices("llama-30b")
    assert len(shapes.matrices("llama-7b")) == 224
    assert set(shapes.matrices("llama-7b")) == {(4096, 4096), (11008, 4096), (4096, 11008)}


def test_counted_traffic_of_a_galore_step_is_six_bytes_a_weight_in_bf16():
    case = Case("galore_step", 8192, 8192, 4, torch.bfloat16, True, "cpu")
    assert OPS["galore_step"].traffic(case) / (8192 * 8192) == pytest.approx(6, rel=0.01)
    assert OPS["galore_step"].flop(case) == 4 * 8192 * 8192 * 4


def test_inputs_are_the_same_at_every_call():
    case = Case("galore_step", 9, 7, 3, torch.float32, False, "cpu")
    first, second = make(case), make(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert serving(case)[0]


def test_ratio_is_taken_round_by_round_so_that_drift_cancels():
    base = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio, noise = timing.ratio([[1.5 * t for t in base]], [base])
    assert (ratio, noise) == (1.5, False)
    assert timing.ratio([[0.9, 1.1, 1.0, 0.8, 1.2]], [[1.0] * 5]) == (1.0, True)
    assert timing.ratio([[2.0, 2.0], [2.0]], [[8.0]]) == (0.25, False)


def test_quantiles():
    assert timing.spread([[5.0, 1.0, 3.0], [2.0, 4.0]]) == pytest.approx((1.8, 3.0, 4.2, 3.0 / 1.8 - 1))
    assert timing.spread([[7.0]]) == (7.0, 7.0, 7.0, None)


def test_the_spread_covers_what_drifts_between_passes():
    assert timing.spread([[10.0] * 9, [10.0] * 9, [13.0]]) == pytest.approx((10.0, 10.0, 10.0, 0.3))
    assert timing.parts([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3) == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert timing.parts([1.0, 2.0]) == [[1.0], [2.0]]


def test_interleave_runs_every_variant_once_a_round():
    calls = []
    timer = timing.Timer("cpu")
    times = timer.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0, at_least=5, warmup=1)
    assert [len(t) for t in times.values()] == [5, 5]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(2, len(calls), 2))


def steal(monkeypatch, disturbed):
    """Let the host take the cores during the rounds that `disturbed`, an iterator of booleans, says."""
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, 9.0 * took) for took in disturbed))
    monkeypatch.setattr(timing._Stolen, "_seconds", lambda self: next(clock))


def test_disturbed_rounds_are_replaced(monkeypatch):
    steal(monkeypatch, itertools.cycle([False, True]))
    calls, timer = itertools.count(), timing.Timer("cpu")
    monkeypatch.setattr(timing.Timer, "_time", lambda self, prepared: prepared.run())
    times = timer.interleave({"a": lambda: next(calls)}, seconds=1e-9, at_least=2, at_most=2, warmup=0)
    assert times == {"a": [0, 1]} and not timer.quiet  # no patience is left: what there is
    steal(monkeypatch, itertools.cycle([False, True]))
    times = timer.interleave({"a": lambda: next(calls)}, seconds=60, at_least=3, at_most=3, warmup=0)
    assert times == {"a": [2, 4, 6]} and timer.quiet


@pytest.mark.parametrize(
    "quiet, passes, disturbed",
    [([True, True, True], 3, False), ([False, True, True], 2, False), ([False, True, False], 3, True), ([False], 1, True)],
)
def test_disturbed_passes_are_left_out_if_two_others_are_there(monkeypatch, quiet, passes, disturbed):
    trial = kernels.Trial(Case("project", 8, 6, 2, torch.float32, True, "cpu"))
    trial.check()
    for undisturbed in quiet:
        steal(monkeypatch, itertools.cycle([not undisturbed]))
        trial.time(timing.Timer("cpu"), seconds=0)
    served, oracle, base = trial.rows(CEILINGS)
    assert served["samples"] == base["samples"] == kernels.ROUNDS * passes
    assert [row["disturbed"] for row in (served, oracle, base)] == [disturbed] * 3
    assert (served["spread"] is None) == (served["noise"] is None) == disturbed


def test_extra_bytes_sees_a_temporary():
    big = 64 << 20
    assert timing.extra_bytes(lambda: torch.ones(big, dtype=torch.uint8).sum(), "cpu") > big * 0.9
    assert timing.extra_bytes(lambda: None, "cpu") < big * 0.1


def test_cycle_needs_a_whole_gap_and_forgives_what_happens_once():
    assert optimizers.cycle([1.0, 1.0], 3) == (None, None)
    assert optimizers.cycle([1.0, 1.0, 4.0], 3) == (2.0, 4.0)
    assert optimizers.cycle([1.0, 9.0, 4.0, 1.0, 1.0, 4.0], 3) == (2.0, 4.0)


def test_optimizers(capsys, tmp_path):
    path = tmp_path / "rows.json"
    names = [name for name in optimizers.CONTENDERS if not optimizers.why_missing(name) and not name.startswith("torchao")]
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "16x24",
        "--rank",
        "4",
        "--gap",
        "3",
        "--base",
        "adamw-fused",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--optimizers",
        ",".join(names),
        "--json",
        str(path),
    )
    assert (code, err) == (0, "")
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())}
    ours = rows["lowrank"]
    assert ours["worst_s"] >= ours["amortised_s"] > 0 and ours["first_s"] > 0 and ours["overhead_s"] > 0
    assert ours["ratio"] > 0 and rows["adamw-fused"]["ratio"] is None
    assert ours["matrices"] == 2 and ours["rank"] == 4 and ours["device"]
    assert ours["command"] in out
    # two moments and a basis a matrix, and a few scalars
    assert 0 <= ours["state_bytes"] - 4 * 2 * (2 * 24 * 4 + 16 * 4) < 100
    assert rows["adamw-fused"]["state_bytes"] >= 2 * 2 * 4 * 24 * 16
    assert rows["gemms"]["state_bytes"] == 0
    for name, row in rows.items():
        periodic = optimizers.CONTENDERS[name].periodic and name != "galore-torch"
        assert [row[key] is not None for key in ("refresh_s", "amortised_s", "worst_s")] == [periodic] * 3, name
        assert row["command"].startswith("lowrank bench optimizers --shape 24x16 16x24")
        assert f"--optimizers {name}" in row["command"]
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["spread"] >= 0


def test_states_in_fewer_bits_are_smaller(capsys, tmp_path):
    path = tmp_path / "rows.json"
    names = ("q-galore", "galore8bit", "lowrank", "adamw-fused")
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "320x256",
        "--rank",
        "64",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--optimizers",
        ",".join(names),
        "--json",
        str(path),
    )
    sizes = {row["optimizer"]: row["state_bytes"] for row in json.loads(path.read_text())}
    assert code == 0 and sorted(names, key=sizes.get) == list(names) and len(set(sizes.values())) == 4


def test_a_refresh_is_amortised_over_a_gap_that_the_steps_do_not_cover(capsys, tmp_path):
    path = tmp_path / "rows.json"
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "--rank",
        "4",
        "--gap",
        "50",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--optimizers",
        "lowrank",
        "--json",
        str(path),
    )
    (row,) = json.loads(path.read_text())
    assert row["worst_s"] is None and row["base"] == "lowrank"
    assert row["amortised_s"] == pytest.approx(row["median_s"] + row["refresh_s"] / 50)


def test_the_state_of_a_tensor_subclass_is_that_of_its_parts():
    class Codes(torch.Tensor):
        @staticmethod
        def __new__(cls, codes):
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes = codes
            return made

        def __tensor_flatten__(self):
            return ["codes"], []

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(function)

    optimizer = type("Optimizer", (), {"state": {0: {"exp_avg": Codes(torch.zeros(100, dtype=torch.uint8)), "step": 3}}})
    assert optimizers.state_bytes(optimizer) == 100


@pytest.mark.parametrize("svd", [False, True])
def test_galore_torch_shows_its_refresh_only_with_its_svd(capsys, tmp_path, svd):
    pytest.importorskip("galore_torch")
    path = tmp_path / "rows.json"
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "--rank",
        "4",
        "--gap",
        "2",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--optimizers",
        "galore-torch,lowrank",
        "--json",
        str(path),
        *["--svd"] * svd,
    )
    assert code == 0
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())}
    shown = [rows["galore-torch"][key] is not None for key in ("first_s", "worst_s", "amortised_s")]
    assert shown == [svd] * 3 and (rows["lowrank"]["amortised_ratio"] is not None) == svd
    assert ("random bases" in out) != svd


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_random_bases_have_the_layout_of_the_svds(shape):
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    gradient = torch.randn(shape)

    def basis():
        p = projector(4)
        p.project(gradient, 0)
        return p.ortho_matrix

    real = basis()
    with optimizers.random_bases():
        random = basis()
    assert random.shape == real.shape and random.stride() == real.stride()
    assert random.untyped_storage().nbytes() == real.untyped_storage().nbytes()
    assert torch.equal(basis(), real)
    wide = random if random.shape[0] < random.shape[1] else random.T
    torch.testing.assert_close(wide @ wide.T, torch.eye(4))


def test_a_base_that_is_not_installed_says_how_to_install_it(capsys, monkeypatch):
    missing = optimizers.CONTENDERS["galore-torch"]._replace(module="nonexistent_module")
    monkeypatch.setitem(optimizers.CONTENDERS, "galore-torch", missing)
    for more in ([], ["--optimizers", "lowrank,galore-torch"], ["--optimizers", "lowrank", "--base", "galore-torch"]):
        code, out, err = run(capsys, "optimizers", "--shape", "8x8", "--rank", "2", *more)
        assert code == 2
        assert err.count("\n") == 1 and "pip install galore-torch" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--optimizers", "lowrank,adma"], "unknown 'adma'; valid: lowrank, "),
        (["--shape", "8x8", "--rank", "9", "--optimizers", "lowrank"], "--rank 9 is too large for shape 8x8"),
        (["--model", "llama-70b"], "'llama-7b'"),
        (["--optimizers", "lowrank", "--csv", "missing/rows.csv"], "cannot write"),
    ],
    ids=" ".join,
)
def test_bad_input_of_optimizers(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "optimizers", *argv)
    assert code == 2
    assert err.count("\n") == 1 and message in err


def test_floors_exit_1_on_a_miss(capsys, monkeypatch, tmp_path):
    pytest.importorskip("galore_torch")
    path = tmp_path / "floors.json"
    monkeypatch.setattr(
        floors,
        "FLOORS",
        [
            Floor("a time over its base", "<= 1.15x", 1.15, lambda timer: 1.1, at_least=False),
            Floor("a speedup", ">= 1.8x faster", 1.8, lambda timer: 1.5, at_least=True),
        ],
    )
    code, out, err = run(capsys, "floors", "--json", str(path))
    assert code == 1 and "1 of 2 floors missed" in err
    assert "1.10x  ok" in out and "1.50x  MISSED" in out
    assert [row["holds"] for row in json.loads(path.read_text())] == [True, False]


def test_floors_of_large_runs_wait_for_all(capsys, monkeypatch):
    pytest.importorskip("galore_torch")
    monkeypatch.setattr(
        floors,
        "FLOORS",
        [Floor("a large run", "<= 12 GiB", 12.0, lambda timer: 13.0, at_least=False, form="{:.2f} GiB", long=True, speed=False)],
    )
    code, out, _ = run(capsys, "floors")
    assert code == 0 and "not measured: --all" in out
    code, out, _ = run(capsys, "floors", "--all")
    assert code == 1 and "13.00 GiB  MISSED" in out


def test_a_processor_is_held_to_the_floors_of_its_class(capsys, monkeypatch):
    lines = {}
    for processor in (floor.WIDE, "AVX2"):
        monkeypatch.setattr(floors, "processor_class", lambda: processor)
        code, out, _ = run(capsys, "floors", "--list")
        assert code == 0
        lines[processor] = [tuple(map(str.strip, line.split("  ", 1))) for line in out.splitlines()]
    changed = {wide[0]: (wide[1], narrow[1]) for wide, narrow in zip(*lines.values()) if wide != narrow}
    assert [promise for _, promise in lines[floor.WIDE]] == [found.promise for found in floors.FLOORS]
    assert (">= 3.5x faster", ">= 1.8x faster") in changed.values() and ("<= 3x", "<= 4x") in changed.values()
    assert (">= 2.3x faster", ">= 2.07x faster") in changed.values() and (">= 70%", ">= 63%") in changed.values()
    assert changed.keys() == {found.what for found in floors.FLOORS if found.speed}
    assert not any("memory" in what or "energy" in what or "bytes of" in what for what in changed)


@pytest.mark.parametrize(
    "capability, flags, name",
    [
        ("AVX512", "avx2 avx512f avx512_vnni", floor.WIDE),
        ("AVX512", "avx2 avx512f", "AVX-512 without VNNI"),
        ("AVX2", "avx2 avx_vnni", "AVX2"),
        ("AVX2", "avx2 avx512_vnni", "AVX2"),
        ("DEFAULT", "neon", "DEFAULT"),
    ],
)
def test_the_class_of_a_processor(monkeypatch, capability, flags, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(floor.Path, "read_text", lambda self: f"flags : {flags}\n")
    assert floor.processor_class() == name


def test_peak_memory_is_that_of_a_real_run():
    flags = "--model llama-1m --batch-size 1 --seq-len 32 --steps 1 --eval-tokens 32 --device cpu".split()
    assert 0.1 < memory.peak(*flags)(None) < 8
    with pytest.raises(cli.CommandError, match="ended with code 2"):
        memory.peak(*flags, "--method", "none")(None)


def test_floors_are_chosen_by_their_line(capsys, monkeypatch, tmp_path):
    pytest.importorskip("galore_torch")
    code, out, _ = run(capsys, "floors", "--list")
    assert code == 0 and [line.partition("  ")[0] for line in out.splitlines()] == [floor.what for floor in floors.FLOORS]
    monkeypatch.setattr(
        floors,
        "FLOORS",
        [
            Floor("slow", "<= 1x", 1.0, lambda timer: 1 / 0, at_least=False),
            Floor("Worst kernel", ">= 70%", 0.7, lambda timer: (0.8, "project left"), at_least=True, names=True),
        ],
    )
    path = tmp_path / "floors.json"
    code, out, err = run(capsys, "floors", "--only", "worst", "--json", str(path))
    assert code == 0 and "slow" not in out and "project left" in out
    (row,) = json.loads(path.read_text())
    assert (row["figure"], row["of"], row["command"]) == (0.8, "project left", "lowrank bench floors --only 'Worst kernel'")
    code, out, err = run(capsys, "floors", "--only", "nothing")
    assert code == 2 and err.count("\n") == 1 and "--only nothing" in err


def test_the_worst_kernel_of_each_shape(monkeypatch):
    monkeypatch.setattr(roofline, "SIZE", 48)
    monkeypatch.setattr(roofline, "CHECKED", 24)
    monkeypatch.setattr(roofline, "RANK", 8)
    monkeypatch.setattr(roofline, "SECONDS", 0)
    monkeypatch.setattr(roofline, "ROUNDS", 1)
    monkeypatch.setattr(machine, "COPIED", 1 << 10)
    monkeypatch.setattr(machine, "SQUARE", 8)
    timer = timing.Timer("cpu")
    (least_bytes, bytes_of), (least_products, products_of) = (
        roofline.worst(timer, bound, limit) for bound, limit in (("bytes", 0.0), ("products", 1e9))
    )
    rows = roofline._rows(timer)
    assert {row["op"] for row in rows} == {name for name, op in OPS.items() if not op.other} - {*roofline.OWN}
    assert {row["bound"] for row in rows} == {"bytes", "products"} and all(row["roofline"] > 0 for row in rows)
    assert least_bytes == min(row["roofline"] for row in rows if row["bound"] == "bytes")
    assert f"{least_products}" == f"{min(row['roofline'] for row in rows if row['bound'] == 'products')}"
    assert bytes_of.replace(";", "").split()[0] in OPS and products_of.replace(";", "").split()[0] in OPS
    count = sum(row["bound"] == "bytes" for row in rows)
    assert bytes_of.endswith(f"; {count} of {count} reach it")
    assert products_of.endswith(f"; 0 of {len(rows) - count} reach it")


def test_what_bounds_an_op():
    def bound(op, left):
        limits = kernels.bounds(Case(op, 4096, 4096, 128, torch.float32, left, "cpu"), CEILINGS)
        return max(limits, key=limits.get)

    assert bound("galore_step", True) == bound("newton_schulz", None) == "products"
    assert bound("adamw_step", None) == bound("gather_rows", False) == bound("quantize_int4", True) == "bytes"


def test_quality_is_train_by_other_defaults():
    parser = cli.Parser()
    quality.add_arguments(parser)
    args = parser.parse_args(["--methods", "galore"])
    assert (args.model, args.seeds, args.methods, args.flags) == ("llama-1m", "0,1,2", "galore", [])
    assert quality.run is train.run
