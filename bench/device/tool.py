"""Programs that a phase runs: their output goes to DIR/PHASE.txt as it comes."""

import os
import shutil
import signal
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
    return [
        sys.executable,
        "-m",
        "lowrank_sys",
        "bench",
        "device",
        "--out",
        str(setting.out),
        "--phase",
        phase,
        "--seconds",
        f"{setting.seconds:g}",
        *(["--dry-run"] if setting.dry else []),
    ]


def _interruptible():
    """A shell starts what runs in the background with interrupts ignored, and so would this program's children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def expect(setting, command, **environment):
    """Append the output of a command, print its last line; Failed with that line if it fails.

    One that takes all the time is interrupted as by hand, so that it can say what it has.
    """
    path, late = setting.out / f"{setting.phase}.txt", False
    with path.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, preexec_fn=_interruptible
        )
        try:
            child.wait(max(setting.left, 0))
        except subprocess.TimeoutExpired:
            late = True
            child.send_signal(signal.SIGINT)
            child.wait()  # whoever watches this phase ends it at its limit
    last = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
    if late:
        raise Failed(f"interrupted after {setting.seconds:.0f} s: {last}")
    if child.returncode:
        raise Failed(f"exit code {child.returncode}: {last}")
    print(last)
