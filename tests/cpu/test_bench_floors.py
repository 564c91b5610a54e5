"""`lowrank bench floors`: who is held to which, and the rooflines."""

import json

import pytest
import torch
from benched import CEILINGS, quick, run  # noqa: F401

from lowrank_sys import cli
from lowrank_sys.bench import floors, kernels, machine, timing
from lowrank_sys.bench.cases import OPS
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors import floor, memory, roofline
from lowrank_sys.bench.floors.floor import Floor


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
    flags = "--model llama-1m --batch-size 1 --seq-len 32 --steps 1 --eval-tokens 32 --device cpu --data".split()
    assert 0.1 < memory.peak(*flags, json.__file__)(None) < 8
    with pytest.raises(cli.CommandError, match="ended with code 2"):
        memory.peak("--steps", "none")(None)


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
