"""Whether this tree trains as another revision does, to the bit: python tests/golden BASE [--only TEXT].

BASE is checked out beside this tree, and both run runner.py at once, on one thread each, in lockstep. Two passes: all cases from
the start; then both go on from checkpoints that BASE wrote in the middle of a refresh gap. Of a case that differs, the tensors of
the first such step are printed. Exit status 1 if anything differs that EXPECTED does not name.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("runner.py")
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")
BUILT = ("*.so", "_build.json")
SHOWN = 4  # tensors of a step

# (pattern of a case, pattern of a tensor): why it may differ from an older revision's.
EXPECTED = {
    ("*, scaled", "*"): "a step whose GradScaler found an infinity leaves bases and moments as they are, and the refresh due",
    ("*, accumulate clipped", "*"): "coefficients come last in parameters(): torch's clip_grad_norm_ sums norms in another order",
    **dict.fromkeys(
        [(f"{method}, int8*", "*") for method in ("galore", "galore [a-z]*", "adafactor*", "grass*", "fira*", "frugal*")],
        "the update of an INT8 weight is rounded itself, not the difference of two fp32 weights",
    ),
    **dict.fromkeys(
        [("galore8bit*", "*"), ("q-galore*", "*")],
        "8-bit moments of a low-rank gradient are in blocks of one row, or in fp32 where its rows are short; checkpoints follow",
    ),
    ("galore int4*", "*"): "a basis in INT4 is unpacked panel by panel inside the products, which add up in another order",
    ("adafactor*, bf16, *", "*"): "weight decay and the update of a bf16 weight are rounded once",
    **dict.fromkeys([("adafactor*, in_backward clipped", "*"), ("grass*, in_backward clipped", "*")], "R is scaled in place of G"),
    ("adafactor int4*", "*"): "G is multiplied by the codes of a basis, not by the basis that they stand for",
}

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def built(package):
    """The native modules of a package folder."""
    return [path for pattern in BUILT for path in package.glob(pattern)]


def give_modules(base, tree):
    """Native modules for the checkout `tree` of `base`: this tree's own if the sources are the same, else built once and kept."""
    here = built(ROOT / "lowrank_sys")
    if not here:
        return  # pure Python against pure Python
    if subprocess.run(["git", "-C", ROOT, "diff", "--quiet", base, "--", *NATIVE]).returncode:
        sources = [git("rev-parse", f"{base}:{path}") for path in NATIVE]
        kept = ROOT / "build" / "golden" / hashlib.sha256(repr((sources, torch.__version__, sys.version)).encode()).hexdigest()[:16]
        if not kept.exists():
            print(f"building the native modules of {base}", flush=True)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=tree, check=True, env={**os.environ, "LOWRANK_CUDA": "0"}, stdout=subprocess.DEVNULL)
            made = kept.with_suffix(".new")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
            for path in built(tree / "lowrank_sys"):
                path.rename(made / path.name)
            made.rename(kept)
        here = built(kept)
    for path in here:
        (tree / "lowrank_sys" / path.name).symlink_to(path.resolve())


@contextlib.contextmanager
def checkout(base):
    """Folder of `base` with its native modules."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        tree = Path(folder, "base")
        git("worktree", "add", "--detach", tree, base)
        try:
            give_modules(base, tree)
            yield tree
        finally:
            git("worktree", "remove", "--force", tree)


class Side:
    """runner.py on one tree, as a stream of its results."""

    def __init__(self, tree, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, RUNNER, "--root", tree, *arguments]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        self._stream = self._results()

    def cases(self):
        """[(case, its results)], in the order in which they come."""
        return itertools.groupby(self._stream, key=lambda result: result[0])

    def _results(self):
        with contextlib.suppress(EOFError):
            while True:
                yield pickle.load(self.process.stdout)

    def finish(self):
        for _ in self._stream:  # what nobody read would keep the runner waiting
            pass
        if self.process.wait():
            sys.exit(f"{self.process.args[3]}: the runner ended with status {self.process.returncode}")


def tensor(value):
    dtype, shape, data = value
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape) if data else torch.empty(shape)


def ordered(x):
    """Integers in the order of floats, one apart where these are neighbours."""
    bits = x.view(INTEGERS[x.element_size()]).long()
    return torch.where(bits < 0, -(1 << 8 * x.element_size() - 1) - bits, bits)


def distance(before, now):
    """How two different values differ, in words."""
    if not (isinstance(before, tuple) and isinstance(now, tuple)) or before[:2] != now[:2]:
        spelled = [f"{v[0]} {v[1]}" if isinstance(v, tuple) else repr(v) for v in (before, now)]
        return f"{spelled[0]} in the base, {spelled[1]} here"
    a, b = tensor(before), tensor(now)
    far = (a.double() - b.double()).abs()
    count = int((a != b).sum())
    text = f"max abs {far.nan_to_num(nan=torch.inf).max().item():.3g} in {count} of {a.numel()}"
    return f"{text}, {int((ordered(a) - ordered(b)).abs().max())} ulps" if a.is_floating_point() else text


def expected(case, name):
    return any(fnmatch.fnmatchcase(case, c) and fnmatch.fnmatchcase(name, n) for c, n in EXPECTED)


def difference(case, before, now):
    """What differs between the results of a case, in words; None if nothing does."""
    for (_, step, old), (_, _, new) in zip(before, now):
        names = [n for n in old | new if old.get(n, "none") != new.get(n, "none") and not expected(case, n)]
        if names:
            lines = [f"{n}: {distance(old.get(n, 'none'), new.get(n, 'none'))}" for n in names[:SHOWN]]
            more = [f"and {len(names) - SHOWN} more of {len(old)}"] if len(names) > SHOWN else []
            return "\n    ".join([f"{case}: differs from step {step} on", *lines, *more])
    return None


def compare(trees, *arguments, save=None):
    """Run both trees; returns how many cases differ."""
    sides = [Side(trees[0], *arguments, *(("--save", save) if save else ())), Side(trees[1], *arguments)]
    counts = dict.fromkeys(("the same", "different", "refused by both", "new here"), 0)
    for (case, before), (other, now) in zip(*(side.cases() for side in sides)):
        if case != other:
            sys.exit(f"the runners are at different cases, {case!r} and {other!r}")
        (first, before), (second, now) = peek(before), peek(now)
        if first is None or second is None:
            kind = "refused by both" if first == second else "new here" if first is None else "different"
            if kind == "different":
                print(f"{case}: refused here: {next(now)[2]}")
        else:
            found = difference(case, before, now)
            kind = "different" if found else "the same"
            if found:
                print(found, flush=True)
        counts[kind] += 1
    for side in sides:
        side.finish()
    print(", ".join(f"{count} {kind}" for kind, count in counts.items() if count), flush=True)
    return counts["different"]


def peek(results):
    """(the step of the first result, all results)."""
    first = next(results)
    return first[1], itertools.chain([first], results)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="revision to compare this tree with")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    base = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}")
    with checkout(base) as tree, tempfile.TemporaryDirectory(prefix="golden-") as saved:
        print(f"{base[:12]} and this tree, from the start", flush=True)
        differing = compare((tree, ROOT), "--only", arguments.only, save=saved)
        print(f"and from checkpoints of {base[:12]}", flush=True)
        differing += compare((tree, ROOT), "--only", arguments.only, "--resume", saved)
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
