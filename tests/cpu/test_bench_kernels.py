"""`lowrank bench kernels`: flags, files, and the check that stands before every speed."""

import csv
import json

import pytest
import torch
from benched import CEILINGS, quick, run, run_kernels  # noqa: F401

from lowrank_sys import backends, cli
from lowrank_sys._ops import named_steps
from lowrank_sys.bench import kernels, shapes, timing
from lowrank_sys.bench.cases import OPS, serving
from lowrank_sys.bench.cases.case import Case


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
