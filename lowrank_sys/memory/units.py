"""Sizes of memory, as people write them."""

import re

from lowrank_sys.cli import CommandError

UNITS = {
    "": 1, "B": 1,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}  # fmt: skip


def parse(text: str, flag: str) -> int:
    """Bytes of a size such as 24GiB, 1.5 TB or 8000000000. Raises CommandError naming `flag`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    size = 0 if unit is None else round(float(match[1]) * UNITS[unit])
    if size < 1:
        valid = "bytes, KiB, MiB, GiB, TiB or KB, MB, GB, TB"
        raise CommandError(f"{flag}: got {text!r}; it must be a size above 0 in {valid}, as 24GiB")
    return size


def show(size: int) -> str:
    """Bytes for people: 1.2 GiB."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:,.2f} {unit}"
    return f"{size} B"
