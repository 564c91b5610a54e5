"""What surrounds a command: readers that leave, full disks, closed streams, launchers' variables, limits of memory, odd names."""

import os
import resource
import subprocess
import sys

import pytest
from lanes import usual

from lowrank_sys.cli import CommandError
from lowrank_sys.memory import limits
from lowrank_sys.train import launcher, report

MAIN = "import sys\nfrom lowrank_sys import cli\n"
GIB = 1 << 30


def start(code, **streams):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([sys.executable, "-c", MAIN + code], **streams)


@pytest.mark.parametrize("words", usual([["info"]], ["--help"], ["plan", "--help"], ["info", "--json"]), ids=" ".join)
def test_a_reader_that_left_is_no_error(words):
    child = start(f"sys.exit(cli.main({words}))")
    child.stdout.close()
    said = child.stderr.read()
    # where Python does not buffer stdout, argparse itself drops what it cannot write
    assert said == b"" and child.wait() in ((0, 141) if "--help" in words else (141,))


def test_much_output_into_a_pipe_that_closes_midway():
    child = start(
        "import types\ncli.importlib.import_module('lowrank_sys.info').run = "
        "lambda args: print('line\\n' * 100_000)\nsys.exit(cli.main(['info']))"
    )
    assert child.stdout.readline() == b"line\n"
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        child = start("sys.exit(cli.main(['info', '--json']))", stdout=full)
        said = child.stderr.read().decode()
    assert child.wait() == 1 and said.count("\n") == 1 and "cannot write to stdout" in said


def test_stderr_that_nobody_reads_stops_nothing():
    child = start("for i in range(3): cli.say('progress')\nprint('done')")
    child.stderr.close()
    assert child.stdout.read() == b"done\n" and child.wait() == 0


def test_streams_that_were_closed():
    child = start("sys.stderr = None\nsys.exit(cli.main(['train', '--steps', '0']))")
    assert child.stdout.read() == b"" and child.wait() == 2


def test_names_that_stdout_cannot_spell():
    code = (
        "cli.importlib.import_module('lowrank_sys.info').run = lambda args: print('l\\xe4ufe \\udce9')\n"
        "sys.exit(cli.main(['info']))"
    )
    child = start(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert child.stdout.read() == b"l\\xe4ufe \\udce9\n" and child.wait() == 0


def test_variables_of_a_launcher_of_one_process_are_left():
    for before in ({}, {"WORLD_SIZE": ""}, {"RANK": " ", "LOCAL_RANK": ""}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}):
        environ = {**before, "HOME": "/"}
        launcher.leave(environ)
        assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    "name, value",
    [
        ("WORLD_SIZE", "0"),
        ("RANK", "first"),
        ("LOCAL_RANK", "1.0"),
        ("LOCAL_WORLD_SIZE", "²"),
        ("WORLD_SIZE", "--1"),
        ("RANK", "-1"),
    ],
)
def test_variables_that_are_no_numbers_are_named(name, value):
    environ = {name: value}
    with pytest.raises(CommandError, match=f"^{name}={value}: it must be a whole number"):
        launcher.leave(environ)
    assert environ == {name: value}


def test_variables_of_a_launcher_of_several_processes():
    given = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
    environ = {**given, "MASTER_ADDR": "there", "MASTER_PORT": "29500"}
    place = launcher.leave(environ)
    assert place == (5, 8, 1, 4, tuple(given.items())) and not place.first
    assert environ == {"MASTER_ADDR": "there", "MASTER_PORT": "29500"}  # until it joins
    with pytest.raises(CommandError, match="WORLD_SIZE=8: LOCAL_RANK, MASTER_ADDR, MASTER_PORT must be set too.*--nproc 8"):
        launcher.leave({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5"})


# --- memory


@pytest.fixture
def alone(monkeypatch):
    """No Slurm and no ulimit but the test's own."""
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)


def machine(root, files):
    usual = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n",
        "proc/self/status": f"Name:\tpython\nVmSize:\t{20 << 20} kB\nVmRSS:\t{2 << 20} kB\nVmData:\t{3 << 20} kB\n",
    }
    for name, text in {**usual, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return limits.available_bytes(root)


def v2(folder, limit, used, stat="", high="max"):
    return {
        f"sys/fs/cgroup/{folder}/{name}": text
        for name, text in {"memory.max": limit, "memory.current": used, "memory.stat": stat, "memory.high": high}.items()
    }


def v1(folder, limit, used, stat=""):
    return {
        f"sys/fs/cgroup/memory/{folder}/{name}": text
        for name, text in {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}.items()
    }


GROUPS = {
    "nothing": ({}, 32),
    "the parent is tighter": ({"proc/self/cgroup": "0::/a/b", **v2("a", 6 * GIB, 5 * GIB), **v2("a/b", 9 * GIB, GIB)}, 1),
    "the kernel slows down from memory.high on": ({"proc/self/cgroup": "0::/a", **v2("a", 9 * GIB, GIB, high=4 * GIB)}, 3),
    "a group of the host, seen from a container": ({"proc/self/cgroup": "0::/../../x", **v2("", 5 * GIB, GIB)}, 4),
    "a path of the host that is not mounted": ({"proc/self/cgroup": "0::/kubepods/pod1", **v2("", 5 * GIB, 2 * GIB)}, 3),
    "over its limit": ({"proc/self/cgroup": "0::/a", **v2("a", GIB, 2 * GIB)}, 0),
    "cached pages, version 2": (
        {"proc/self/cgroup": "0::/a", **v2("a", 4 * GIB, 4 * GIB, f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}")},
        3,
    ),
    "cached pages, version 1": (
        {"proc/self/cgroup": "4:cpu,memory:/a", **v1("a", 4 * GIB, 4 * GIB, f"inactive_file 5\ntotal_inactive_file {2 * GIB}")},
        2,
    ),
    "both versions mounted": ({"proc/self/cgroup": "3:memory:/j\n2:cpu:/k\n0::/", **v1("j", 8 * GIB, 2 * GIB), **v1("k", 1, 1)}, 6),
}


@pytest.mark.parametrize("name", GROUPS)
def test_control_groups(tmp_path, alone, name):
    files, right = GROUPS[name]
    assert machine(tmp_path, files) == right * GIB


@pytest.mark.parametrize(
    "variables, right",
    [
        ({"SLURM_MEM_PER_NODE": "10240"}, 8),
        ({"SLURM_MEM_PER_NODE": "0"}, 32),
        ({"SLURM_MEM_PER_NODE": ""}, 32),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "3"}, 4),
        ({"SLURM_MEM_PER_CPU": "3072"}, 1),
        ({"SLURM_MEM_PER_NODE": "many"}, 32),
    ],
)
def test_slurm_without_control_groups(tmp_path, alone, monkeypatch, variables, right):
    for item in variables.items():
        monkeypatch.setenv(*item)
    assert machine(tmp_path, {}) == right * GIB


@pytest.mark.parametrize("kind, right", [(resource.RLIMIT_AS, 10), (resource.RLIMIT_DATA, 27)])
def test_ulimit(tmp_path, alone, monkeypatch, kind, right):
    monkeypatch.setattr(resource, "getrlimit", lambda k: (30 * GIB if k == kind else resource.RLIM_INFINITY,) * 2)
    assert machine(tmp_path, {}) == right * GIB


def test_kernels_that_tell_less(tmp_path, alone):
    old = "MemTotal: 1000 kB\nMemFree: 300 kB\nBuffers: 50 kB\nCached: 200 kB\nShmem: 100 kB"
    assert machine(tmp_path, {"proc/meminfo": old}) == 450 * 1024
    (tmp_path / "proc/meminfo").unlink()
    assert 0 < limits.available_bytes(tmp_path) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- names


@pytest.mark.parametrize("name", ["a $\\undefined$ b", "$x", "price_{5}$^", "x" * 400, "Wörter 数据 \udcff\ta\nb", "\\$ $ $"])
def test_any_name_is_drawn(tmp_path, name):
    rows = [{"step": 0, "loss": None, "val_loss": 2.0}, {"step": 1, "loss": 2.0, "val_loss": 1.5}]
    report.plot(tmp_path / "loss.png", rows, 1.0, name)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_is_shown_on_one_line_and_cut_in_the_middle():
    assert report._shown("a\tb\nc $d$ \udcff") == "a b c $d$ \\udcff"
    assert len(report._shown("x" * 200)) <= 91 and report._shown("a" * 100 + "b" * 100).endswith("b" * 45)
