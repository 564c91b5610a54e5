"""Programs that a phase runs: their output goes to DIR/PHASE.txt as it comes."""

import os
import shutil
import subprocess
import sys

from lowrank_sys.bench.device.setting import Failed, Skipped


def installed(name, setting):
    """The command of a tool, [] in a dry run; Skipped where it is not installed."""
    if setting.dry:
        return []
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path is None:
        raise Skipped(f"{name} is not installed")
    return [path]


def ourselves(setting, phase):
    """The command that runs another phase with this setting."""
    return [sys.executable, "-m", "lowrank_sys", "bench", "device", "--out", str(setting.out), "--phase", phase, "--seconds",
            f"{setting.seconds:g}", *(["--dry-run"] if setting.dry else [])]


def run(setting, command, **environment):
    """Append the output of a command; returns (exit code, its last line)."""
    path = setting.out / f"{setting.phase}.txt"
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}).returncode
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, lines[-1]


def expect(setting, command, **environment):
    code, last = run(setting, command, **environment)
    if code:
        raise Failed(f"exit code {code}: {last}")
    print(last)
