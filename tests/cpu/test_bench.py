"""`lowrank bench`: flags, files, the check that stands before every speed, and the arithmetic of the figures."""

import csv
import json

import pytest
import torch

from lowrank_sys import backends, cli
from lowrank_sys.bench import floors, kernels, machine, optimizers, shapes, timing
from lowrank_sys.bench.cases import OPS, make, serving
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import Floor

CEILINGS = {"copy_gb_per_s": 10.0, "gemm_gflop_per_s": {"float32": 100.0, "bfloat16": 100.0, "float16": 100.0}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_largest_cache", lambda: 0)
    monkeypatch.setattr(timing, "LEAST_FILL", 1 << 10)
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
        assert (row["ratio"] is None) == (row["noise"] is None) == is_base
        assert (row["check"] is None) == is_base and row["check"] in (None, "ok")
    assert rows[0]["device"] in out
    assert not list(tmp_path.glob(".*"))


def test_no_op_is_missing():
    assert set(OPS) == {row.op.partition(".")[0] for row in backends.table()}
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


@pytest.mark.parametrize("op, wrong", [
    ("project", lambda grad, basis, *, left: 1.01 * torch.ops.lowrank.project(grad, basis, left=left)),
    ("project", lambda grad, basis, *, left: torch.ops.lowrank.project(grad, basis, left=left).fill_(torch.nan)),
    ("galore_step", lambda *tensors, **hyper: None),
    ("subspace_iteration", lambda grad, basis, **arguments: (basis, torch.ones(basis.shape[1]))),
    ("subspace_iteration", lambda grad, basis, **arguments: (2 * basis, torch.ones(basis.shape[1]))),
], ids=["a percent off", "nan", "does nothing", "an old basis", "not orthonormal"])
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


@pytest.mark.parametrize("argv, message", [
    (["--shape", "12"], "not MxN"),
    (["--shape", "12x0"], "not MxN"),
    (["--shape", "8x6", "--rank", "7"], "--rank 7 is too large for shape 8x6: at most 6"),
    (["--rank", "0"], "not a positive integer"),
    (["--op", "project", "--base", "svd"], "valid: reference, gemm"),
    (["--dtype", "fp8"], "'fp32', 'bf16', 'fp16'"),
    (["--model", "gpt-2"], "'llama-60m'"),
    (["--device", "tpu"], "valid: cpu"),
    (["--json", "/nonexistent/rows.json"], "/nonexistent/rows.json"),
    (["--csv", "/"], "cannot write"),
], ids=" ".join)
def test_bad_input(capsys, argv, message):
    code, out, err = run(capsys, "kernels", *argv)
    assert code == 2
    assert err.count("\n") == 1 and message in err


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
    assert found == ([("project", m, n, r, left) for m, n in sizes for r in (64, 128) for left in (True, False)]
                     + [("adamw_step", m, n, None, None) for m, n in sizes])


def test_matrices_of_llama_7b():
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
    ratio, noise = timing.ratio([1.5 * t for t in base], base)
    assert (ratio, noise) == (1.5, False)
    assert timing.ratio([0.9, 1.1, 1.0, 0.8, 1.2], [1.0] * 5) == (1.0, True)
    assert timing.ratio([2.0, 2.0, 2.0], [8.0]) == (0.25, False)


def test_quantiles():
    assert timing.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_interleave_runs_every_variant_once_a_round():
    calls = []
    timer = timing.Timer("cpu")
    times = timer.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0, at_least=5, warmup=1)
    assert [len(t) for t in times.values()] == [5, 5]
    assert all(set(calls[i:i + 2]) == {"a", "b"} for i in range(2, len(calls), 2))


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
    code, out, err = run(capsys, "optimizers", "--shape", "24x16", "16x24", "--rank", "4", "--gap", "3", "--base",
                         "adamw-fused", "--device", "cpu", "--json", str(path))
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


@pytest.mark.parametrize("svd", [False, True])
def test_galore_torch_shows_its_refresh_only_with_its_svd(capsys, tmp_path, svd):
    pytest.importorskip("galore_torch")
    path = tmp_path / "rows.json"
    code, out, err = run(capsys, "optimizers", "--shape", "24x16", "--rank", "4", "--gap", "2", "--device", "cpu",
                         "--json", str(path), *["--svd"] * svd)
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
    code, out, err = run(capsys, "optimizers", "--shape", "8x8", "--rank", "2")
    assert code == 2
    assert err.count("\n") == 1 and "pip install galore-torch" in err


def test_floors_exit_1_on_a_miss(capsys, monkeypatch, tmp_path):
    pytest.importorskip("galore_torch")
    path = tmp_path / "floors.json"
    monkeypatch.setattr(floors, "FLOORS", [
        Floor("a time over its base", "<= 1.15x", 1.15, lambda timer: 1.1, at_least=False),
        Floor("a speedup", ">= 1.8x faster", 1.8, lambda timer: 1.5, at_least=True),
    ])
    code, out, err = run(capsys, "floors", "--json", str(path))
    assert code == 1 and "1 of 2 floors missed" in err
    assert "1.10x  ok" in out and "1.50x  MISSED" in out
    assert [row["holds"] for row in json.loads(path.read_text())] == [True, False]
