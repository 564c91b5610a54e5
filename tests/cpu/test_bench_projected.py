"""`lowrank bench projected`: what projected layers save, counted."""

import json

import pytest

from lowrank_sys import cli


def test_rows(tmp_path, capsys):
    """Of llama-1m at r = 32, by hand: 14 layers of two blocks, hidden 192 and intermediate 512."""
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "projected", "--model", "llama-1m", "--rank", "32", "--tokens", "256", "--json", str(path)]) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())}
    for name, row in rows.items():
        assert row["dense_in_backward"] == (0 if name.startswith("projected") else 14)
    gradients = {name: row["gradient_bytes"] for name, row in rows.items()}
    dense, left, right = (8 * (4 * 192 * 192 + 3 * 192 * 512), 8 * 32 * (6 * 192 + 512), 8 * 32 * (5 * 192 + 2 * 512))
    assert gradients["adamw"] == gradients["galore"] == dense
    assert (gradients["projected, left"], gradients["projected, right"]) == (left, right)
    inputs = 8 * 256 * (3 * 192 + 512)  # of q, k and v together, of o, of gate and up together, of down
    for name in ("adamw", "galore", "galore, accumulate", "projected, left"):
        assert rows[name]["kept_bytes"] == inputs
    assert rows["projected, right"]["kept_bytes"] == 8 * 256 * 7 * 32 < rows["projected, right"]["kept_at_first_bytes"] < inputs
    assert rows["projected, right, shared"]["kept_bytes"] == 8 * 256 * 4 * 32
    assert rows["projected, right"]["step_peak_bytes"] < rows["galore"]["step_peak_bytes"]
    assert "projected, auto" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "llama-2m"], "--model llama-2m: must be one of llama-1m"),
        (["--tokens", "300"], "--tokens must be a multiple of 256, got 300"),
        (["--model", "llama-1m", "--rank", "4096"], "--rank 4096: rank must be at most 192"),
    ],
)
def test_bad_input(flags, message, capsys):
    assert cli.main(["bench", "projected", *flags]) == 2
    assert message in capsys.readouterr().err
