"""`lowrank bench device`: flags and refusals, and the phases one after another, each in a process of its own."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from lowrank_sys.bench import machine, report, shapes
from lowrank_sys.bench.cases import OPS
from lowrank_sys.bench.device.setting import Failed, Setting, Skipped, failures, read
from lowrank_sys.cli import CommandError

# Phase -> (share of the seconds, GiB that the card must have). The lane compiles kernels in many processes: what follows finds
# them compiled.
PHASES = {
    "facts": (0.08, 4),
    "lane": (0.2, 16),
    "smoke": (0.12, 4),
    "kernels": (0.25, 8),
    "training": (0.2, 23),
    "sanitizer": (0.08, 4),
    "counters": (0.07, 4),
}
# What the tools of a phase run, by themselves no phases.
CALLS = {"small-calls": "small", "large-calls": "large"}
OLDEST = (8, 0)
# Of the time of a phase, what it may plan with: the rest is for its start and end.
PLANNED = 0.9
# Exit codes of a phase's process beside 0; with any other one, it died.
FAILED, SKIPPED, DIED = 1, 3, 5
LOG = 4000  # characters of what a phase said that summary.json keeps of one that is not ok


def add_arguments(parser):
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help=f"a new folder for what is found: {', '.join(PHASES)}, a file each, and summary.json",
    )
    parser.add_argument(
        "--seconds", type=shapes.seconds, metavar="N", default=600.0, help="for all phases together (default: %(default)g)"
    )
    parser.add_argument("--only", nargs="+", choices=PHASES, metavar="PHASE", help=f"some of {', '.join(PHASES)} (default: all)")
    parser.add_argument(
        "--ops",
        nargs="+",
        choices=OPS,
        default=list(OPS),
        metavar="NAME",
        help="ops of the phases smoke and kernels (default: all)",
    )
    parser.add_argument("--dry-run", action="store_true", help="all of it on the CPU, at toy sizes: no figure counts")
    parser.add_argument("--phase", choices=[*PHASES, *CALLS], help=argparse.SUPPRESS)


def run(args):
    if args.phase:
        return _phase(args)
    chosen = [name for name in PHASES if name in (args.only or PHASES)]
    if not args.dry_run:
        _expect_card(chosen)
    try:
        args.out.mkdir(parents=True)
    except FileExistsError:
        raise CommandError(f"--out {args.out}: it exists already; name a new folder") from None
    except OSError as error:
        raise CommandError(f"--out {args.out}: cannot make it: {error.strerror}") from None
    done, end = [], time.monotonic() + args.seconds
    for i, name in enumerate(chosen):
        share = PHASES[name][0] / sum(PHASES[other][0] for other in chosen[i:])
        done.append(_watch(name, args, share * max(end - time.monotonic(), 0)))
        print("{phase:10} {verdict:8} {seconds:6.1f} s  {said}".format(**done[-1]), flush=True)
        _write(
            args.out / "summary.json",
            {"dry_run": args.dry_run, "asked_s": args.seconds, "commit": machine.commit(), "phases": done},
        )
    wrong = [row["phase"] for row in done if row["verdict"] not in ("ok", "skipped")]
    if wrong:
        raise CommandError(f"{len(wrong)} of {len(done)} phases failed: {', '.join(wrong)}; see {args.out}", code=1)
    return 0


def _expect_card(chosen):
    if not torch.cuda.is_available():
        raise CommandError("no CUDA device here; --dry-run does all of it on the CPU, at toy sizes")
    card, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    if capability < OLDEST:
        raise CommandError(f"{card} has compute capability {_dotted(capability)}; the kernels need {_dotted(OLDEST)} or later")
    memory = torch.cuda.get_device_properties(0).total_memory
    for name in chosen:
        if memory < PHASES[name][1] << 30:
            raise CommandError(
                f"{name} needs {PHASES[name][1]} GiB of memory, {card} has {report.size(memory)}; "
                f"--only {' '.join(other for other in chosen if memory >= PHASES[other][1] << 30)} fits"
            )


def _dotted(capability):
    return ".".join(map(str, capability))


def _watch(name, args, seconds):
    """Run a phase to its end or to its limit. One that dies behind a part is started again behind that part."""
    start, verdict, said = time.monotonic(), "died", "no time was left"
    rows = args.out / f"{name}.jsonl"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        while (left := start + seconds - time.monotonic()) > 0:
            begun = _begun(rows)
            verdict, how = _process(name, args, left, log)
            log.seek(0)
            text = log.read().strip()
            said = how or (text.splitlines() or [""])[-1]
            if verdict != "died" or _begun(rows) == begun:
                break
        if verdict == "died" and (parts := failures(read(rows))):
            said = f"{', '.join(parts)}: {said}"
    if behind := [row for row in read(rows) if "left_out" in row]:
        said += f"; {len(behind[-1]['left_out'])} left out: {behind[-1]['why']}"
    return {
        "phase": name,
        "verdict": verdict,
        "seconds": time.monotonic() - start,
        "said": said,
        **({} if verdict in ("ok", "skipped") else {"log": text[-LOG:] if seconds > 0 else ""}),
    }


def _begun(rows):
    return sum("begin" in row for row in read(rows))


def _process(name, args, seconds, log):
    """(verdict, why if the log does not say so)."""
    words = ["--out", str(args.out), "--phase", name, "--seconds", str(PLANNED * seconds), "--ops", *args.ops]
    command = [sys.executable, "-m", "lowrank_sys", "bench", "device", *words, *(["--dry-run"] if args.dry_run else [])]
    environment = {**os.environ, **({"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""} if args.dry_run else {})}
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return "late", f"ended after {seconds:.0f} s, its limit"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with all that it started
            child.wait()
    if code < 0:
        return "died", f"killed by {signal.Signals(-code).name}"
    return {0: "ok", FAILED: "failed", SKIPPED: "skipped"}.get(code, "died"), ""


def _phase(args):
    """One phase, in this process: its exit code; its last line says what there is to say."""
    setting = Setting(args.out, args.phase, args.seconds, tuple(args.ops), args.dry_run, time.monotonic())
    try:
        if args.phase in CALLS:
            getattr(importlib.import_module("lowrank_sys.bench.device.calls"), CALLS[args.phase])(setting)
        else:
            importlib.import_module(f"lowrank_sys.bench.device.{args.phase}").run(setting)
    except Failed as error:
        print(error)
        return FAILED
    except Skipped as why:
        print(why)
        return SKIPPED
    except Exception:
        traceback.print_exc()
        return DIED
    return 0


def _write(path, value):
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
