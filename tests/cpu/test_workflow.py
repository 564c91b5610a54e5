"""The workflow runs what a contributor runs: targets of the Makefile, by its variables, and every stack."""

import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]


def made():
    """(targets, variables) of every `make` of the workflow."""
    runs = [step["run"] for job in JOBS.values() for step in job["steps"] if step.get("run", "").startswith("make ")]
    for words in (run.split()[1:] for run in (re.sub(r"\$\{\{.*?\}\}", "X", run) for run in runs)):
        yield [word for word in words if "=" not in word], [word.partition("=")[0] for word in words if "=" in word]


def test_its_commands_are_of_the_makefile():
    targets = set(re.findall(r"^([\w -]+):", MAKEFILE, re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    asked = list(made())
    assert {"lint", "test", "test-torch211", "sdist", "wheel", "wheel-cuda", "test-wheels", "docs", "test-stacks"} == {
        name for names, _ in asked for name in names
    }
    assert {name for names, _ in asked for name in names} <= targets
    assert all(f"$({name})" in MAKEFILE for _, names in asked for name in names)


def test_its_stacks_are_all():
    stacks = runpy.run_path(str(ROOT / "tests" / "stacks" / "__main__.py"))["STACKS"]
    assert JOBS["stacks"]["strategy"]["matrix"]["stack"] == list(stacks)
