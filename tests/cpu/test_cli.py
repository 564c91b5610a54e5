"""The `lowrank` command: what it lists, one-line errors with exit codes, and `lowrank info`."""

import json
import subprocess
import sys

import pytest
import torch

import lowrank_sys
from lowrank_sys import _ops, cli, info


def run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_the_subcommands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert name in out


def test_python_m_lowrank_sys_is_the_command():
    for argv, code in (["--help"], 0), (["nonsense"], 2):
        done = subprocess.run([sys.executable, "-m", "lowrank_sys", *argv], capture_output=True, text=True)
        assert done.returncode == code
        assert all(name in (done.stdout or done.stderr) for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "argv, listed",
    [
        (["nonsense"], cli.COMMANDS),
        ([], cli.COMMANDS),
        (["info", "--nonsense"], ["--json"]),
        (["bench"], ["kernels", "optimizers", "floors"]),
        (["bench", "kernels", "--nonsense"], ["--op", "--shape", "--base"]),
        (["bench", "kernels", "--op", "nonsense"], ["galore_step", "subspace_iteration"]),
        (["train", "--method", "nonsense"], ["adamw", "galore"]),
        (["train", "--nonsense"], ["--method", "--model"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_that_lists_what_is_valid(capsys, argv, listed):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("lowrank")
    for name in listed:
        assert name in err


def test_an_error_the_user_can_act_on_has_its_own_exit_code(capsys, monkeypatch):
    def fail(args):
        raise cli.CommandError("the disk\nis full", code=1)

    monkeypatch.setattr(info, "run", fail)
    assert run(capsys, "info") == (1, "", "lowrank info: error: the disk is full\n")


def test_help_imports_nothing_heavy_but_torch():
    code = (
        "import sys\nfrom lowrank_sys import cli\ncli.main(['--help'])\ncli.main(['train', '--help'])\n"
        "print([m for m in ('transformers', 'datasets', 'matplotlib', 'rich', 'galore_torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")


def test_info_names_versions_devices_and_who_serves_each_op(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert lowrank_sys.__version__ in out and torch.__version__ in out and "cpu: " in out
    for op in _ops.SCHEMAS:
        assert f"\n{op} " in out


def test_info_json(capsys):
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert {row["op"] for row in facts["ops"]} == set(_ops.SCHEMAS)
    assert all(row["implementation"] for row in facts["ops"])


def test_info_tells_why_there_is_no_native_build(capsys, monkeypatch):
    monkeypatch.setattr(info.backends, "NATIVE_MISSING", "lowrank_sys._C is not built")
    assert "none (lowrank_sys._C is not built)" in run(capsys, "info")[1]


def test_info_prints_the_metadata_of_the_build(capsys, monkeypatch):
    record = {"compiler": "g++ 13.2", "cuda_architectures": ["80", "90"]}
    monkeypatch.setattr(info.backends, "build_record", lambda: record)
    monkeypatch.setattr(info.backends, "NATIVE_MISSING", "")
    out = run(capsys, "info")[1]
    assert "compiler: g++ 13.2" in out and "cuda_architectures: 80, 90" in out
