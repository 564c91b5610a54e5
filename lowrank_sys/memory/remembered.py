"""Measurements kept in the user's cache folder, by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def remembered(kind: str, depends: Any, measure: Callable[[], Any]) -> Any:
    """What `measure` returned for these `depends` (both plain JSON values), now or in an earlier process.

    A file that is damaged or of something else is as good as none; a folder that cannot be written keeps nothing.
    """
    depends = json.loads(json.dumps(depends))
    path = folder() / f"{kind}-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]}.json"
    try:
        there = json.loads(path.read_text())
        if there["depends"] == depends:
            return there["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = measure()
    _write(path, json.dumps({"depends": depends, "value": value}))
    return value


def folder() -> Path:
    """lowrank-sys under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lowrank-sys"


def _write(path: Path, text: str) -> None:
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".partial-", delete=False) as file:
            partial = Path(file.name)
            file.write(text)
        partial.replace(path)
    except OSError:
        if partial is not None:
            partial.unlink(missing_ok=True)
