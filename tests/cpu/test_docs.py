"""The documentation: its links, the pages made from the program, and the site."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_sys import _ops
from lowrank_sys.train.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/results/*.md")])


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        import pages

        yield pages
    finally:
        sys.path.pop(0)


def test_links_lead_to_files():
    found = [
        (page, target) for page in PAGES for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 100
    assert [f"{page.relative_to(ROOT)}: {target}" for page, target in found if not (page.parent / target).exists()] == []


def test_every_flag_has_a_line(pages):
    text = pages.flags()
    for prog, parser in pages.parsers():
        part = text.split(f"## {prog}\n")[1].split("\n## ")[0]
        names = [action.option_strings for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        assert all(f"`{', '.join(options)}" in part for options in names if options)
    assert "`--update-proj-gap N`" in text and "## lowrank bench floors" in text
    assert "%(default)s" not in text  # defaults are filled in


def test_every_op_and_every_method_has_a_part(pages):
    ops, methods = pages.ops(), pages.methods()
    assert re.findall(r"^### `(.+)`$", ops, re.MULTILINE) == list(_ops.SCHEMAS)
    assert all(f"{op}{schema}" in ops for op, schema in _ops.SCHEMAS.items())
    assert re.findall(r"^## `(.+)`$", methods, re.MULTILINE) == list(METHODS)


def test_the_measured_table_has_the_committed_figures(pages):
    rows = pages.measured().splitlines()[2:-1]
    assert [row.split("`")[1] for row in rows] == [
        row["method"] for row in sorted(pages._rows("methods-llama-9m.json"), key=lambda r: r["val_loss"])
    ]
    galore = next(row for row in rows if row.startswith("| `galore` "))
    step = next(row for row in pages._rows("optimizers-llama-60m.json") if row["optimizer"] == "lowrank")
    assert galore.endswith(f"| {1e3 * step['median_s']:.0f} ms |")


def build(tmp_path, root):
    """mkdocs on the sources in `root`, into a folder of its own."""
    environment = {**os.environ, "LOWRANK_BACKEND": "reference", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs builds the site in a folder of its own")
    done = build(tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    for page in ("index", "choose/index", "reference/flags/index", "reference/ops/index", "reference/methods/index"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 10_000
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("docs", "mkdocs.yml", ".git"):
            (copy / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    (copy / "docs" / "faq.md").write_text("# Questions\n\n[gone](gone.md) and [lost](numerics.md#lost)\n")
    done = build(tmp_path, copy)
    assert done.returncode != 0 and "gone.md" in done.stderr and "#lost" in done.stderr
