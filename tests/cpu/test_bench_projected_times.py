"""`lowrank bench projected --times`: its arithmetic, and what its rows hold."""

import json

import pytest

from lowrank_sys import cli


def test_rows(tmp_path, capsys):
    """FLOP of one block of llama-1m at r = 32 on 256 tokens, by hand; medians of what was timed."""
    path = tmp_path / "rows.json"
    arguments = "--times --model llama-1m --rank 32 --tokens 256 --blocks 1 --rounds 2".split()
    assert cli.main(["bench", "projected", *arguments, "--json", str(path)]) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())}
    weights, sides = 4 * 192 * 192 + 3 * 192 * 512, 4 * 384 + 3 * 704
    flop = {
        "adamw fused": 4 * 256 * weights,
        "galore": 4 * 256 * weights + 4 * 32 * weights,
        "projected, left": 2 * 256 * weights + 2 * 256 * 32 * sides + 2 * 32 * weights,
        "projected, right, shared": 2 * 256 * weights + 2 * 256 * 32 * (sides - 3 * 192) + 2 * 32 * weights,  # of k, v and up
    }
    assert {name: rows[name]["flop"] for name in flop} == flop
    assert rows["projected, right"]["flop"] == rows["projected, left"]["flop"]
    for row in rows.values():
        assert (row["layers"], row["samples"]) == (7, 2) and row["total_s"] > 0
        assert row["total_s"] == pytest.approx(row["narrow_s"] + row["backward_s"] + row["step_s"])  # medians of two are means
    assert rows["adamw fused"]["over_adamw"] == rows["galore"]["over_galore_cpu"] == 1
    assert "projected, right, shared" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--blocks", "--rounds"])
def test_bad_input(flag, capsys):
    assert cli.main(["bench", "projected", "--times", flag, "0"]) == 2
    assert "'0' is not a positive integer" in capsys.readouterr().err
