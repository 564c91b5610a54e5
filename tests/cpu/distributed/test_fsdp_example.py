"""examples/fsdp2.py learns, under torchrun too."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "fsdp2.py"


def test_it_learns_on_two_processes():
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "--log-dir", os.devnull, str(EXAMPLE),  # by default a folder stays behind
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses, other = map(ast.literal_eval, re.findall(r"\[[^\[\]]*\]", run.stdout))  # lines of two processes may be one
    assert losses == other and len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
