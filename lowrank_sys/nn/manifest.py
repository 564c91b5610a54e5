"""Folders that know their files: a manifest with size and SHA-256 of every one, and a seal of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sign(folder: Path, **body: Any) -> None:
    """Write the manifest of `folder`: size and SHA-256 of every file in it, and `body`, plain JSON values."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / MANIFEST
    }
    body = {**body, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": _seal(body)}, indent=1))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that was signed, after checking every file against it.

    Raises ValueError saying in a few words what is wrong.
    """
    manifest = _manifest(folder)
    _check_files(folder, manifest)
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        seal, _ = manifest.pop("sha256"), manifest["files"]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if seal != _seal(manifest):
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"{name} is damaged (its SHA-256 differs)")


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
