"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-00000100` with a `manifest.json`: the step, the identity of the run (what must be the
same for a resume to mean anything), what it ran on, and size and SHA-256 of every file. It is written to a `.partial-*`
folder, synced to the disk and only then renamed, so a folder with the final name is complete; the manifest shows what
happened to it since.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowrank_sys.cli import CommandError
from lowrank_sys.nn.manifest import MANIFEST, sign
from lowrank_sys.nn.manifest import verify as verify_signed

PARTIAL = ".partial-"


def write(root: Path, step: int, identity: dict[str, Any], fill: Callable[[Path], None], keep: int, **more: Any) -> Path:
    """Save a checkpoint under `root` and rotate: the newest `keep` stay.

    fill: writes the files into the folder that it is handed. identity, and what else the manifest is to say: plain JSON values.
    Raises CommandError (code 1) when it cannot be written; earlier checkpoints are then as they were.
    """

    def fill_and_sign(folder: Path) -> None:
        fill(folder)
        sign(folder, step=step, identity=identity, **more)

    target = root / f"step-{step:08d}"
    publish(target, fill_and_sign, what=f"checkpoint of step {step}")
    folders = _folders(root)
    # newer ones are what a resume passed over: damaged, and of a future that is being trained again
    kept = [folder for found, folder in folders if found <= step][:keep]
    for _, folder in folders:
        if folder not in kept:
            remove(folder)
    return target


def publish(target: Path, fill: Callable[[Path], None], what: str) -> None:
    """Make the folder `target` with what `fill` writes, in one go, in place of an older one if there is one.

    Raises CommandError (code 1), naming `what`, when it cannot be written; `target` is then as it was.
    """
    partial = target.with_name(PARTIAL + target.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        sync_tree(partial)
        remove(target)
        partial.rename(target)
        _sync(target.parent)
    # torch and safetensors report a full disk with types of their own, RuntimeError and SafetensorError among them
    except Exception as error:
        reason = f"{error} ({_free(target.parent)})"
        shutil.rmtree(partial, ignore_errors=True)
        raise CommandError(f"--out {target.parent}: could not save the {what}: {reason}", code=1) from error


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint `folder`, after checking every file against it.

    Raises ValueError saying in a few words what is wrong.
    """
    manifest = verify_signed(folder)
    if folder.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def newest(root: Path, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint under `root` that verifies, and its manifest; None if there are no checkpoints.

    tell: called with one line for each newer one that was passed over, and why.
    Raises CommandError (code 1) if there are checkpoints and none verifies.
    """
    folders = _folders(root)
    for _, folder in folders:
        try:
            return folder, verify(folder)
        except (ValueError, OSError) as error:
            tell(f"skipped checkpoint {folder}: {error}")
    if folders:
        raise CommandError(f"--resume: no checkpoint under {root} is intact; choose another --out to start anew", code=1)
    return None


def remove(folder: Path) -> None:
    """Delete a folder so that no half of it is ever found under its own name."""
    if folder.exists():
        doomed = folder.with_name(f"{PARTIAL}old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Delete what a killed run left half written."""
    for path in root.glob(PARTIAL + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Make the file `path` with what `write` writes, in one go: a reader sees the old or the new content."""
    partial = path.with_name(PARTIAL + path.name)
    try:
        write(partial)
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except Exception as error:
        reason = f"{error} ({_free(path.parent)})"
        partial.unlink(missing_ok=True)
        raise CommandError(f"--out {path.parent}: could not write {path.name}: {reason}", code=1) from error


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder under `folder` is on the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint, newest first."""
    found: Iterator[Path] = (p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
    return sorted(((int(p.name[5:]), p) for p in found), reverse=True)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
