"""The process baseline is kept from plan to plan, by what it depends on."""

import json
import os

import pytest
from test_planner import arguments

from lowrank_sys.memory import process, remembered


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Baselines measured so far; they count up. In a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []

    def measure(args, probe):
        seen.append(args)
        return process.Baseline(100 + len(seen), 200, True)

    monkeypatch.setattr(process, "_measure", measure)
    return seen


def files():
    return list(remembered.folder().iterdir())


def test_a_run_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = process.measure(arguments(data=json.__file__))
    assert found.measured and 200 << 20 < found.training < 4 << 30 and 200 << 20 < found.finishing < 4 << 30


def test_a_fine_tuning_is_measured_as_a_training(measured):
    args = arguments()
    args.from_, args.data = "a folder", "chats.jsonl"
    process.measure(args)
    assert (measured[0].from_, measured[0].data) == (None, "python-stdlib")


def test_kept_for_the_same_process(measured):
    first = process.measure(arguments(model="llama-1m"))
    assert first == process.Baseline(101, 200, True)
    # none of these changes what a process needs without tensors
    for changes in ({}, {"model": "llama-9m"}, {"rank": 4}, {"lr": 0.1}, {"batch_size": 2, "seq_len": 999}):
        assert process.measure(arguments(**{"model": "llama-1m", **changes})) == first
    assert len(measured) == 1 and len(files()) == 1


def test_measured_anew_where_something_else_is(measured, monkeypatch, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    for count, changes in enumerate(({}, {"method": "apollo"}, {"dtype": "bf16"}, {"weights": "int8"}, {"data": str(text)}), 1):
        assert process.measure(arguments(**changes)).training == 100 + count
    text.write_text("one and two")
    process.measure(arguments(data=str(text)))
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    process.measure(arguments())
    assert len(measured) == len(files()) == 7
    for _ in range(2):  # a glob is not read to find out
        process.measure(arguments(data=str(tmp_path / "*.txt")))
    assert len(measured) == 9 and len(files()) == 7


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"depends": 1, "value": [1, 2, true]}'])
def test_a_damaged_file_is_measured_anew(measured, damage):
    process.measure(arguments())
    (path,) = files()
    path.write_bytes(damage)
    assert process.measure(arguments()).training == 102
    assert process.measure(arguments()).training == 102 and files() == [path]
    assert json.loads(path.read_text())["value"] == [102, 200, True]


def test_nowhere_to_write(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [process.measure(arguments()).training for _ in range(2)] == [101, 102]
    assert os.listdir(tmp_path) == ["file"]


def test_a_gpu_is_not_measured(measured):
    assert process.measure(arguments(device="cuda")).training == process.CUDA_CONTEXT and not measured
