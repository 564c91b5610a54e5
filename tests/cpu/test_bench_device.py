"""`lowrank bench device`: all of it dry on the CPU, phases that die, and what it refuses."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lowrank_sys import backends, cli
from lowrank_sys.bench import capture, kernels, machine
from lowrank_sys.bench.cases import OPS
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.device import command, tool
from lowrank_sys.bench.device import kernels as phase_kernels
from lowrank_sys.bench.device.setting import Failed, Setting, Skipped, failures, read

# What the phases' processes do before anything else.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = ("datasets", "bitsandbytes", "torchao")
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.partition(".")[0] in absent else find(name, *rest))
"""
DIE = """
import sys
if "smoke" in sys.orig_argv and "--phase" in sys.orig_argv:
    import os, signal
    from lowrank_sys.bench.device import smoke
    checked = smoke._checked
    smoke._checked = lambda case: os.kill(os.getpid(), signal.SIGSEGV) if case.left else checked(case)
"""


def before(patch, folder, code):
    """Let every process of Python run `code` first."""
    (folder / "sitecustomize.py").write_text(code)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))


@pytest.mark.full
def test_a_dry_run_goes_through_all_phases(monkeypatch, tmp_path):
    """Where datasets and the peers cannot be imported. One test: it takes a minute."""
    out = tmp_path / "out"
    before(monkeypatch, tmp_path, HIDE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = cli.main(["bench", "device", "--dry-run", "--seconds", "900", "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert [(row["phase"], row["verdict"]) for row in summary["phases"]] == [(name, "ok") for name in command.PHASES], summary
    assert code == 0 and summary["dry_run"]
    assert {path.name for path in out.iterdir()} == {
        "summary.json",
        "facts.jsonl",
        "smoke.jsonl",
        "lane.txt",
        "kernels.jsonl",
        "training.jsonl",
        "sanitizer.txt",
        "counters.txt",
    }
    facts_name_who_serves_and_who_is_missing(read(out / "facts.jsonl"))
    smoke_has_every_op_on_every_side(read(out / "smoke.jsonl"))
    kernels_has_every_op_and_its_peers(read(out / "kernels.jsonl"))
    training_has_its_runs_and_a_profile(read(out / "training.jsonl"))
    assert "12 calls" in (out / "sanitizer.txt").read_text() and "4 calls" in (out / "counters.txt").read_text()
    assert "needs a CUDA device" in (out / "lane.txt").read_text()


def facts_name_who_serves_and_who_is_missing(rows):
    assert rows[0]["torch"] == torch.__version__ and rows[0]["native build"]
    assert next(row["missing"] for row in rows if "missing" in row).keys() == {"bitsandbytes", "torchao"}
    assert {row["op"] for row in rows if "op" in row} == {row.op for row in backends.table()}
    assert rows[-1]["ceilings"]["copy_gb_per_s"] > 0


def smoke_has_every_op_on_every_side(rows):
    rows = [row for row in rows if "check" in row]
    assert {row["op"] for row in rows} == set(OPS) and {row["check"] for row in rows} == {"ok"}
    for name, op in OPS.items():
        found = sorted((row["dtype"], row["side"] or "") for row in rows if row["op"] == name)
        assert found == sorted((dtype, side) for dtype in ("fp32", "bf16") for side in (["left", "right"] if op.sided else [""]))


def kernels_has_every_op_and_its_peers(rows):
    rows = [row for row in rows if "variant" in row]
    assert {row["op"] for row in rows} == set(OPS)
    for name, op in OPS.items():
        mine = [row for row in rows if row["op"] == name]
        served, peers = [row for row in mine if "check" in row], {row["variant"] for row in mine if "check" not in row}
        assert served and all(row["check"] == "ok" and row["median_s"] > 0 and row["roofline"] > 0 for row in served)
        assert peers == op.bases.keys()
        for row in mine:
            missing = row["variant"] in ("bitsandbytes", "torchao")
            assert ("skipped" in row) == missing, row
            assert missing or row["p20_s"] <= row["median_s"] <= row["p80_s"]
        there = op.bases.keys() - {"bitsandbytes", "torchao"}
        assert all(row["over"].keys() == (there if row["shape"] == "32x32" else there - {"svd"}) for row in served)


def training_has_its_runs_and_a_profile(rows):
    assert [row["method"] for row in rows if "tokens_per_s" in row] == ["q-galore", "galore", "adamw"]
    shares = [row["share"] for row in rows if "kernel" in row]
    assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1 + 1e-9


def test_a_phase_that_dies_is_named_and_leaves_the_others(capsys, monkeypatch, tmp_path):
    before(monkeypatch, tmp_path, DIE)
    out = tmp_path / "out"
    code = cli.main(["bench", "device", "--dry-run", "--out", str(out), "--only", "facts", "smoke", "--ops", "project"])
    said, err = capsys.readouterr()
    assert code == 1 and err.count("\n") == 1 and "1 of 2 phases failed: smoke" in err
    facts, smoke = json.loads((out / "summary.json").read_text())["phases"]
    assert facts["verdict"] == "ok" and read(out / "facts.jsonl")
    assert smoke["verdict"] == "failed" and "project fp32 left" in smoke["said"] and smoke["said"] in said
    # it was started again behind each part that killed it
    assert {row["part"] for row in read(out / "smoke.jsonl") if "check" in row} == {"project fp32 right", "project bf16 right"}
    assert failures(read(out / "smoke.jsonl")) == ["project bf16 left", "project fp32 left"]


def test_a_phase_is_ended_at_its_limit(tmp_path):
    args = SimpleNamespace(out=tmp_path, ops=["project"], dry_run=True)
    with open(tmp_path / "log", "w+") as log:
        assert command._process("smoke", args, 0.2, log) == ("late", "ended after 0 s, its limit")
    row = command._watch("smoke", args, 0.0)
    assert (row["verdict"], row["said"]) == ("died", "no time was left")


def test_a_tool_that_takes_too_long_says_what_it_has(tmp_path):
    code = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('2 failed so far')"
    start = time.monotonic()
    with pytest.raises(Failed, match="interrupted after 4 s: 2 failed so far"):
        tool.expect(setting(tmp_path, seconds=4.0), [sys.executable, "-c", code])
    assert time.monotonic() - start < 30
    with pytest.raises(Failed, match="exit code 9: the end"):
        tool.expect(setting(tmp_path), [sys.executable, "-c", "print('the end'); raise SystemExit(9)"])


def setting(tmp_path, seconds=60.0):
    return Setting(tmp_path, "smoke", seconds, (), True, time.monotonic())


def test_a_part_that_raises_is_written_and_the_rest_goes_on(tmp_path):
    def skip():
        raise Skipped("not installed")

    with pytest.raises(Failed, match="2 of 4 failed: broken, wrong"):
        setting(tmp_path).each(
            {
                "broken": lambda: 1 / 0,
                "absent": skip,
                "wrong": lambda: [{"check": "wrong: error 1"}],
                "good": lambda: [{"check": "ok"}, {"check": None}],
            }
        )
    rows = read(setting(tmp_path).rows)
    assert [row["part"] for row in rows if "part" in row] == ["broken", "absent", "wrong", "good", "good"]
    assert "ZeroDivisionError" in rows[1]["failed"] and "1 / 0" in rows[1]["traceback"]


def test_parts_behind_the_end_of_the_time_are_named(tmp_path):
    setting(tmp_path, seconds=1.0).each({"a": lambda: [{}], "b": lambda: [{}]}, reserve=5.0)
    assert read(setting(tmp_path).rows) == [{"left_out": ["a", "b"], "why": "the time was over"}]


def test_a_row_that_was_cut_short_is_no_row(tmp_path):
    (tmp_path / "rows").write_text('{"begin": "a"}\n{"part": "a", "che')
    assert read(tmp_path / "rows") == [{"begin": "a"}] and failures(read(tmp_path / "rows")) == ["a"]


def card(monkeypatch, *, capability=(9, 0), memory=80 << 30, there=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Abacus 3000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory))


@pytest.mark.parametrize(
    "found, words, message",
    [
        ({"there": False}, [], "no CUDA device here; --dry-run"),
        ({"capability": (7, 5)}, [], "Abacus 3000 has compute capability 7.5; the kernels need 8.0 or later"),
        (
            {"memory": 12 << 30},
            ["--only", "facts", "training"],
            "training needs 23 GiB of memory, Abacus 3000 has 12.0 GiB; --only facts fits",
        ),
        ({}, ["--out", "."], "--out .: it exists already"),
        ({}, ["--out", "/dev/null/out"], "--out /dev/null/out: cannot make it"),
        ({}, ["--only", "nothing"], "'facts', 'lane', 'smoke'"),
        ({}, ["--ops", "nothing"], "'galore_step'"),
        ({}, ["--seconds", "soon"], "not a number of seconds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, monkeypatch, tmp_path, found, words, message):
    monkeypatch.chdir(tmp_path)
    card(monkeypatch, **found)
    code = cli.main(["bench", "device", *([] if "--out" in words else ["--out", "out"]), *words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_the_most_important_cases_come_first():
    args = SimpleNamespace(ops=tuple(OPS), dry=False, device="cuda")
    names = [name for name, _, _ in phase_kernels.cases(args)]
    assert names[:2] == ["galore_step 4096x4096 r=128 right", "galore_step 4096x11008 r=128 left"]
    assert len(set(names)) == len(names) and {name.split()[0] for name in names} == {op.split()[0] for op in OPS}
    assert names.index("qgalore_step 11008x4096 r=1024 right") < names.index("galore_step 4096x4096 r=256 right")
    assert {"int8_linear 4096x11008 256 tokens", "int8_linear 4096x11008 2048 tokens"} <= set(names)


def test_tensor_cores_have_a_bound_of_their_own_and_tf32_is_beyond_it():
    def bound(op, dtype, device="cuda", size=4096):
        return kernels.products_rounding(Case(op, size, size, 128, dtype, True, device))

    assert bound("galore_step", torch.float32) == 3 * 2**-22 + 4096 / 8 * 2**-24
    assert bound("galore_step", torch.bfloat16) == 4096 / 16 * 2**-24
    assert bound("galore_step", torch.float32, size=11008) < 2**-11 / 3
    assert bound("galore_step", torch.float32, "cpu") == bound("adam_8bit_", torch.float32) == 0


def test_an_fp32_product_may_be_three_of_tf32():
    case = Case("galore_step", 4096, 4096, 1024, torch.float32, True, "cuda")
    ceilings = {"copy_gb_per_s": 1e9, "gemm_gflop_per_s": {"float32": 50.0, "tf32": 300.0}}
    assert kernels.bounds(case, ceilings)["products"] == pytest.approx(4 * 4096**2 * 1024 / 100e9)


def test_ceilings_are_taken_on_random_data(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 1 << 12)
    monkeypatch.setattr(machine, "SQUARE", 16)
    sticks = machine.yardsticks("cpu", [torch.bfloat16])
    operands = sticks[torch.bfloat16][0].args
    assert sticks.keys() == {"copy", torch.bfloat16} and all(a.unique().numel() > 100 for a in operands)
    assert sticks["copy"][1] == 2 * (1 << 12) / 1e9 and sticks[torch.bfloat16][1] == 2 * 16**3 / 1e9


def test_a_call_that_is_not_captured_is_hidden_by_fills_as_long_as_its_launch(monkeypatch):
    monkeypatch.setattr(capture, "_profiled", lambda function: 7)
    eager = capture._eager(print, 400e-6, "it waits", 90e-6)
    assert eager == (print, 7, 400e-6, 7, "not captured: it waits")
    assert capture._eager(print, 10.0, "", 90e-6).fills == capture.MOST_FILLS
