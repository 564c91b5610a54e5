"""What is installed here is in the range of pyproject.toml, and in that of the stack itself where both name a package."""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OURS = {wanted.name: wanted for wanted in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"])}
STACKS = ("axolotl", "llamafactory", "ms-swift", "lightning", "peft", "accelerate", "transformers")


def installed(name):
    """The version of a package; None where it is not here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def misfits(requirements):
    """Those of `requirements` that are about a package of OURS and not met by what is installed."""
    plain = {"extra": ""}
    of_both = [w for w in requirements if w.name in OURS and (w.marker is None or w.marker.evaluate(plain))]
    found = [(wanted, installed(wanted.name)) for wanted in of_both]
    return [f"{wanted}: {version}" for wanted, version in found if version and not wanted.specifier.contains(version)]


def test_ours():
    assert installed("transformers") and not misfits(OURS.values())


@pytest.mark.parametrize("stack", [name for name in STACKS if installed(name)])
def test_the_stack_s_own(stack):
    assert not misfits(map(Requirement, importlib.metadata.requires(stack) or ()))
