"""An install has every file of the package, and imports."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(folder):
    """Python files under `folder`, links followed."""
    return {str(Path(parent, name).relative_to(folder)) for parent, _, names in os.walk(folder, followlinks=True)
            for name in names if name.endswith(".py")}


def test_an_install_has_every_module_and_imports(tmp_path):
    """A package left out of pyproject.toml still works in the source tree, and only there."""
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path], cwd=ROOT, check=True,
                   capture_output=True)
    assert sources(tmp_path / "lowrank_sys") == sources(ROOT / "lowrank_sys")
    code = ("import lowrank_sys, lowrank_sys.optim, lowrank_sys.bench.command, lowrank_sys.train.command, sys\n"
            "assert lowrank_sys.__file__.startswith(sys.argv[1]), lowrank_sys.__file__")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
