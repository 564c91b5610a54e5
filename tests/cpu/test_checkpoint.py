"""Checkpoints are whole or absent, and damage is seen."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lowrank_sys.cli import CommandError
from lowrank_sys.train import checkpoint

IDENTITY = {"model": "llama-1m", "method": "galore", "lr": 5e-3, "tokenizer": None}


def fill(folder: Path):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 100)
    torch.save({"a": torch.arange(10)}, folder / "optimizer.pt")
    (folder / "shards").mkdir()
    (folder / "shards" / "1.bin").write_bytes(b"shard")


def write(root, *steps, keep=10):
    return [checkpoint.write(root, step, IDENTITY, fill, keep) for step in steps]


def names(root):
    return sorted(path.name for path in root.iterdir())


@contextmanager
def full_disk(limit):
    """Every write past `limit` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_newest_is_found_with_its_identity(tmp_path):
    write(tmp_path, 2, 10, 9)
    (tmp_path / "step-later").mkdir()
    said = []
    folder, manifest = checkpoint.newest(tmp_path, said.append)
    assert folder.name == "step-00000009"  # 10 was of a future that 9 left
    assert manifest["step"] == 9 and manifest["identity"] == IDENTITY and not said
    assert set(manifest["files"]) == {"weights.bin", "optimizer.pt", "shards/1.bin"}
    assert checkpoint.newest(tmp_path / "nowhere", said.append) is None


def test_rotation_keeps_the_newest(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_identity(folder):
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["identity"]["lr"] = 1.0
    path.write_text(json.dumps(manifest))


DAMAGE = [
    ("weights.bin is damaged", lambda folder: flip(folder / "weights.bin")),
    ("optimizer.pt is missing", lambda folder: (folder / "optimizer.pt").unlink()),
    ("weights.bin has 100 bytes instead of 25600", lambda folder: os.truncate(folder / "weights.bin", 100)),
    ("1.bin is damaged", lambda folder: flip(folder / "shards" / "1.bin")),
    ("manifest.json is missing", lambda folder: (folder / checkpoint.MANIFEST).unlink()),
    ("manifest.json is damaged", edit_identity),
    ("manifest.json is damaged", lambda folder: os.truncate(folder / checkpoint.MANIFEST, 50)),
]


@pytest.mark.parametrize("reason, damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, reason, damage):
    good, bad = write(tmp_path, 1, 2)
    damage(bad)
    said = []
    folder, _ = checkpoint.newest(tmp_path, said.append)
    assert folder == good
    assert len(said) == 1 and str(bad) in said[0] and reason in said[0]
    damage(good)
    with pytest.raises(CommandError, match="no checkpoint under .* is intact") as caught:
        checkpoint.newest(tmp_path, said.append)
    assert caught.value.code == 1


def test_a_renamed_checkpoint_does_not_verify(tmp_path):
    (folder,) = write(tmp_path, 1)
    folder.rename(tmp_path / "step-00000005")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.verify(tmp_path / "step-00000005")


def test_a_writer_killed_half_way_leaves_no_checkpoint(tmp_path):
    (good,) = write(tmp_path, 1)

    def die(folder):
        fill(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        checkpoint.write(tmp_path, 2, IDENTITY, die, keep=1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert names(tmp_path) == [".partial-step-00000002", "step-00000001"]
    assert checkpoint.newest(tmp_path, pytest.fail)[0] == good
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    (good,) = write(tmp_path, 1, keep=1)

    def fill_by_torch(folder):  # torch's writer raises RuntimeError, Python's OSError
        torch.save(torch.zeros(10**5), folder / "optimizer.pt")

    for filler in (fill, fill_by_torch):
        with full_disk(10_000), pytest.raises(CommandError, match="could not save the checkpoint of step 2") as caught:
            checkpoint.write(tmp_path, 2, IDENTITY, filler, keep=1)
        assert caught.value.code == 1 and "\n" not in str(caught.value)
        assert names(tmp_path) == ["step-00000001"]
        assert checkpoint.verify(good)["step"] == 1


def test_publish_replaces_and_write_file_is_all_or_nothing(tmp_path):
    for content in ("old", "new"):
        checkpoint.publish(tmp_path / "final", lambda folder: (folder / "a").write_text(content), what="weights")
        assert (tmp_path / "final" / "a").read_text() == content
    checkpoint.write_file(tmp_path / "summary.json", lambda path: path.write_text("whole"))
    with full_disk(10_000), pytest.raises(CommandError, match="could not write summary.json"):
        checkpoint.write_file(tmp_path / "summary.json", lambda path: path.write_text("x" * 20_000))
    assert (tmp_path / "summary.json").read_text() == "whole"
    assert names(tmp_path) == ["final", "summary.json"]
