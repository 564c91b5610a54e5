"""The house: imports run one way, and parts know each other by what they declare."""

import ast
import functools
import re
from pathlib import Path

import pytest

import lowrank_sys

ROOT = Path(lowrank_sys.__file__).parent
# From the ground up: a module imports what stands in its own row or in one before it.
FLOORS = (
    ("_ops",),
    ("reference", "kernels"),
    ("subspace", "schedule"),
    ("distributed",),
    ("backends",),
    ("nn",),
    ("optim", "lora"),
    ("memory", "train", "bench", "info", "cli", "integrations"),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# The oracle is for tests, for dispatch, and for those who measure or account for it.
ORACLE = {"backends", "memory", "bench", "reference"}
PARTS = ("optim", "lora", "schedule", "subspace", "nn")
# Arguments of users, of which a message says what they must be.
ARGUMENTS = {
    ("optim/per_layer.py", "AtStep"),
    ("optim/captured.py", "LowRankOptimizer"),
    ("optim/continual.py", "LowRankOptimizer"),
}
# Modules of a user's model are told by their class.
LAYERS = {"FactoredLinear", "ProjectedLinear", "QuantExperts", "QuantLinear"}
# Names of torch's modules, and of named tuples.
TORCH = {"_parameters", "_buffers", "_replace"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py") or path.parent != ROOT)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """Names of modules of the package that a module imports, those inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lowrank_sys"):
            yield from (
                (node.module, node.module) if node.module != "lowrank_sys" else (f"lowrank_sys.{alias.name}", alias.name)
                for alias in node.names
            )
        elif isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names if alias.name.startswith("lowrank_sys."))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, _ in imports(tree_of(path)):
        other = module.split(".")[1]
        if other in FLOOR and room in FLOOR:
            assert FLOOR[other] <= FLOOR[room], f"{name_of(path)} imports {module}, which stands above it"
        assert other != "reference" or room in ORACLE, f"{name_of(path)} imports the oracle"


@functools.cache
def classes():
    """{class: its file} of the parts."""
    return {
        node.name: name_of(path)
        for path in FILES
        if name_of(path).startswith(PARTS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }


@functools.cache
def private_names():
    """{private name that a class of the parts defines: the files that do}."""
    found = {}
    for path in FILES:
        if name_of(path).startswith(PARTS):
            text = path.read_text()
            for name in {*re.findall(r"def (_[a-z]\w*)\(self", text), *re.findall(r"self\.(_[a-z]\w*)\b", text)}:
                found.setdefault(name, set()).add(name_of(path))
    return found


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith(PARTS)], ids=name_of)
def test_parts_know_what_others_declare_alone(path):
    """No private name of another file's class, and no question what another part is."""
    private, known = private_names(), classes()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and node.attr in private.keys() - TORCH:
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert mine or name_of(path) in private[node.attr], f"{name_of(path)}:{node.lineno} reads {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & known.keys() - LAYERS
            foreign = {name for name in asked if known[name] != name_of(path) and (name_of(path), name) not in ARGUMENTS}
            assert not foreign, f"{name_of(path)}:{node.lineno} asks for {', '.join(foreign)}"
