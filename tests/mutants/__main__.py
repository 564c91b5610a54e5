"""Which tests see which fault: python tests/mutants [NAME ...].

Every mutant of table.py runs in a copy of this tree: first smoke.py, on which it must train, and to other numbers; then tests, up
to the first that fails and does not fail without it: those of its line, what once saw it before the rest, then all of the lanes
that import its file, as `make test` runs them and, if these see nothing, as `make test-full` does. C++ mutants are compiled in
once (LOWRANK_MUTANT chooses); the modules, and by what a mutant was killed, are kept in build/mutants, so that an interrupted
run goes on. Exit status 1 if a mutant survives.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "mutants"
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")
COMPILED = [mutant for mutant in MUTANTS if mutant.file.startswith("csrc/")]
CASE = "galore, fp32, plain"
LIMIT = 3600  # seconds of one run of tests
# Which lanes import what lies in a folder.
LANES = {
    "csrc/core": ("cpu", "host"), "csrc/cpu": ("cpu", "host"), "csrc/ops": ("cpu",), "kernels": ("interpret",),
    "lowrank_sys": ("cpu", "parity"),
}  # fmt: skip


def files(*under):
    """Paths, from the root, of what git tracks or would."""
    command = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "--", *under]
    return sorted(set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()))


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def number(mutant):
    """What chooses a C++ mutant, from 1."""
    return COMPILED.index(mutant) + 1


def planted(source, mutant):
    """The source with a C++ mutant beside the original."""
    chosen = f"lr_mutant({number(mutant)})"
    if mutant.old.endswith(";"):
        return source.replace(mutant.old, f"if ({chosen}) {{ {mutant.new} }} else {{ {mutant.old} }}")
    return source.replace(mutant.old, f"({chosen} ? ({mutant.new}) : ({mutant.old}))")


def copy_to(tree):
    """This tree with all C++ mutants in its sources."""
    listed = "\0".join(path for path in files() if os.path.lexists(ROOT / path))
    packed = subprocess.run(["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=listed.encode(), check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", tree], input=packed.stdout, check=True)
    for mutant in COMPILED:
        path = tree / mutant.file
        path.write_text(planted(path.read_text(), mutant))


def environment(tree, mutant=None, **more):
    chosen = {"LOWRANK_MUTANT": str(number(mutant))} if mutant in COMPILED else {}
    flags = f"{os.environ.get('CXXFLAGS', '')} -include {tree / 'tests/mutants/mutant.h'}"
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CXXFLAGS": flags, "LOWRANK_CUDA": "0", **chosen, **more}


@functools.cache
def modules():
    """Folder of the native modules with all mutants."""
    sources = [(path, (ROOT / path).read_text()) for path in files(*NATIVE)]
    kept = KEPT / digest(sources, [(m.file, m.old, m.new) for m in COMPILED], sys.version)
    if not kept.exists():
        print("building the native modules with all mutants", flush=True)
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Path(folder)
            copy_to(tree)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=tree, check=True, env=environment(tree), stdout=subprocess.DEVNULL)
            made = KEPT / f"new-{os.getpid()}"
            made.mkdir(parents=True)
            for path in (*(tree / "lowrank_sys").glob("*.so"), tree / "lowrank_sys" / "_build.json"):
                (made / path.name).write_bytes(path.read_bytes())
            made.rename(kept)
    return kept


class Tree:
    """A copy to run a mutant in; none: the copy is as good as the original."""

    def __init__(self, mutant=None):
        self.mutant = mutant

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.path = Path(self._folder.name)
        copy_to(self.path)
        for module in modules().iterdir():
            (self.path / "lowrank_sys" / module.name).symlink_to(module)
        if self.mutant and self.mutant not in COMPILED:
            path = self.path / self.mutant.file
            path.write_text(path.read_text().replace(self.mutant.old, self.mutant.new))
        return self

    def __exit__(self, *_):
        self._folder.cleanup()

    def python(self, *arguments, **more):
        """(exit status, stdout and stderr) of a Python program; no status if it takes too long."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.path,
            env=environment(self.path, self.mutant, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            return None, f"takes more than {LIMIT} s"
        return process.returncode, output

    def smoke(self, case):
        """{"before", "after", "digest"}, or what went wrong."""
        status, output = self.python("tests/mutants/smoke.py", case)
        return json.loads(output.splitlines()[-1]) if status == 0 else output[-2000:]

    def first_failure(self, tests, *options):
        """The first test that fails, None if none does."""
        interpret = {"TRITON_INTERPRET": "1"} if tests[0].startswith("tests/interpret") else {}
        status, output = self.python("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests, **interpret)
        if status in (0, 5):  # 5: -k has chosen none
            return None
        named = [line.split(" ", 1)[1].split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if status is None:
            raise TimeoutError(f"{tests[0]} {output}")
        if status != 1 or not named:
            raise RuntimeError(f"pytest {' '.join(tests)}: status {status}\n{output[-2000:]}")
        return named[0]

    def killer(self, tests, *options):
        """The first test that fails, and does not without the mutant; None if none does."""
        without = ()
        while (failed := self.first_failure(tests, *options, *without)) is not None and clean_failure((failed, *options)):
            without += ("--deselect", failed)
        return failed


def runs(mutant):
    """(tests, options) until one sees it: what once did, the tests of its line lane by lane, then whole lanes."""
    if mutant.seen_by:
        yield mutant.tests, ("-k", mutant.seen_by)
    likely, whole = {}, next(lanes for folder, lanes in LANES.items() if mutant.file.startswith(folder))
    for test in mutant.tests:
        likely.setdefault(test.split("/")[1], []).append(test)
    for options in ((), ("--full",)):
        yield from ((tests, options) for tests in likely.values())
        yield from (([f"tests/{lane}"], options) for lane in whole)


def once(function):
    """Each argument's value is computed once, whichever thread asks first."""
    locks, values, guard = {}, {}, threading.Lock()

    def call(argument):
        with guard:
            lock = locks.setdefault(argument, threading.Lock())
        with lock:
            if argument not in values:
                values[argument] = function(argument)
        return values[argument]

    return call


@once
def clean_smoke(case):
    with Tree() as tree:
        return tree.smoke(case)


@once
def clean_failure(run):
    test, *options = run
    with Tree() as tree:
        return tree.first_failure([test], *options)


def judge(mutant):
    """'killed by ...', with --full where `make test` does not see it, 'survives', or what is wrong with the mutant."""
    with Tree(mutant) as tree:
        case = mutant.case or CASE
        found, clean = tree.smoke(case), clean_smoke(case)
        if isinstance(found, str) or isinstance(clean, str):
            return f"breaks its smoke test: {found if isinstance(found, str) else clean}"
        if not found["after"] < found["before"]:
            return f"does not train: a loss of {found['before']:.3f} becomes {found['after']:.3f}"
        if mutant.case and found["digest"] == clean["digest"]:
            return f"changes no number of {case}"
        for tests, options in runs(mutant):
            if failed := tree.killer(tests, *options):
                return f"killed by {'--full ' * ('--full' in options)}{failed}"
    return "survives"


def key(mutant):
    """What a verdict was reached with."""
    paths = [mutant.file, "tests/golden/runner.py", *(test.split("::")[0] for test in mutant.tests)]
    return digest(mutant, [(ROOT / path).read_text() for path in paths], modules().name)


class Verdicts:
    """Verdicts on disk, by `key`."""

    def __init__(self):
        self._path = KEPT / "verdicts.json"
        self._lock = threading.Lock()

    def read(self):
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def keep(self, mutant, verdict):
        with self._lock:
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps({**self.read(), key(mutant): verdict}, indent=1))
            fresh.rename(self._path)

    def of(self, mutant):
        with self._lock:
            known = self.read().get(key(mutant))
        if known is None:
            try:
                known = judge(mutant)
            except TimeoutError as error:
                known = f"no verdict: {error}"
            if known.startswith("killed"):  # else any test that is written later may tell
                self.keep(mutant, known)
        print(f"{MUTANTS.index(mutant) + 1:2} {mutant.file}: {mutant.name}: {known}", flush=True)
        return known


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="parts of the names of the mutants to run; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    wanted = [m for m in MUTANTS if not arguments.names or any(name in m.name for name in arguments.names)]
    modules()
    verdicts = Verdicts()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(verdicts.of, wanted))
    killed = sum(verdict.startswith("killed") for verdict in found)
    seldom = sum(verdict.startswith("killed by --full") for verdict in found)
    print(f"{killed} of {len(wanted)} mutants are killed, {killed - seldom} of them by `make test`")
    sys.exit(killed < len(wanted))


if __name__ == "__main__":
    main()
