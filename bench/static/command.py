"""`lowrank bench --static`: what every kernel needs of every architecture, and rooflines of named cards. No GPU is used."""

import concurrent.futures
import re
import tempfile

from lowrank_sys.bench import machine, report, shapes
from lowrank_sys.bench.cases import OPS
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.cli import CommandError

SUMMARY = "compile every kernel for every architecture, with no GPU: resources, occupancy, rooflines of named cards"


def add_arguments(parser):
    parser.add_argument("--op", nargs="+", metavar="NAME", help="kernels and ops whose names contain one of these (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, metavar="A", help="compute capabilities, as in 80 90 (default: all)")
    parser.add_argument(
        "--shape", type=shapes.parse_shape, default=(4096, 4096), metavar="MxN", help="of the rooflines (default: 4096x4096)"
    )
    parser.add_argument("--rank", type=shapes.positive, default=128, metavar="R", help="default: 128")
    parser.add_argument("--dtype", choices=shapes.DTYPES, default="bf16", help="default: bf16")
    report.add_output_arguments(parser)


def matches(name, args):
    return not args.op or any(wish in name for wish in args.op)


def facts_of(kernel, configuration, arch, build, variant):
    """One row of the first table."""
    from lowrank_sys.bench.static import cards

    return {
        "table": "builds",
        "kernel": kernel,
        "configuration": configuration,
        "arch": arch,
        "variant": variant,
        "threads": build.threads,
        "registers": build.registers,
        "shared_bytes": build.shared,
        "spilled_bytes": build.stack + build.local,
        "tensor_cores": " ".join(build.tensor_cores) or None,
        "wide_loads": build.wide("LDG") + build.wide("LDGSTS"),
        "wide_stores": build.wide("STG"),
        "occupancy": cards.occupancy(arch, registers=build.registers, shared=build.shared, threads=build.threads),
    }


def triton_rows(args, progress):
    """Rows of the Triton kernels, one build a configuration and architecture (more where both sides are required)."""
    from lowrank_sys.bench.static import build, cases

    chosen = [case for case in cases.cover() if matches(case.row.kernel, args) and (not args.arch or case.arch in args.arch)]
    with build.processes() as submit:
        futures = [submit(**cases.arguments(case)) for case in chosen]
        for done, _ in enumerate(concurrent.futures.as_completed(futures), 1):
            progress(f"{done} of {len(futures)} Triton builds")
    for case, future in zip(chosen, futures):
        together = f" x{case.together}" if case.together > 1 else ""
        variant = f"{'left' if case.left else 'right'} {'-'.join(case.types)} {case.variant} {case.sizes}{together}"
        limit = cases.KERNELS[case.row.kernel].limit
        configuration = f"{case.row.kind} {limit}<={case.row.rank}" if case.row.rank else "any"
        yield facts_of(f"triton {case.row.kernel}", configuration, case.arch, future.result(), variant)


def cuda_rows(args, progress, say):
    """Rows of the CUDA C++ kernels, where there is an nvcc."""
    from lowrank_sys.bench.static import cases, sources

    names = [name for name in sources.names() if matches(name, args)]
    if not sources.names():
        say("CUDA C++ is left out: this install has no csrc/cuda")
        return
    if names and sources.compiler() is None:
        say("CUDA C++ is left out: nvcc is not on PATH")
        return
    with tempfile.TemporaryDirectory() as folder:
        for done, name in enumerate(names, 1):
            progress(f"{done} of {len(names)} CUDA sources: {name}")
            archs = tuple(args.arch or cases.ARCHS)
            target = sources.compile_source(name, folder, archs)
            for arch in archs:
                for kernel, build in sources.kernels(target, arch).items():
                    yield facts_of(f"cuda {name}", sources.readable(kernel), arch, build, None)


def roofline_rows(args):
    """Rows of the second table: every op that `lowrank bench kernels` knows, on every card."""
    from lowrank_sys.bench.static import cards

    (m, n), dtype = args.shape, shapes.DTYPES[args.dtype]
    for name, op in OPS.items():
        if not matches(name, args):
            continue
        case = Case(name, m, n, args.rank, dtype, True, "cpu")
        moved, flop = op.traffic(case), op.flop(case)
        row = {
            "table": "rooflines",
            "op": name,
            "shape": f"{m}x{n}",
            "rank": args.rank if op.ranked else None,
            "dtype": args.dtype,
            "bytes": moved,
            "flop": flop,
            "besides": op.other or None,
        }
        for card in cards.CARDS:
            seconds, bound = cards.roofline(cards.CARDS[card], dtype, moved, flop)
            row |= {f"{card} computed_s": seconds, f"{card} bound": bound}
        yield row


BUILD_COLUMNS = [
    ("configuration", lambda row: row["configuration"]),
    ("arch", lambda row: f"sm_{row['arch']}"),
    ("threads", lambda row: str(row["threads"])),
    ("registers", lambda row: str(row["registers"])),
    ("shared", lambda row: report.size(row["shared_bytes"])),
    ("spilled", lambda row: str(row["spilled_bytes"])),
    ("occupancy", lambda row: f"{row['occupancy']:.0%}"),
    ("tensor cores", lambda row: row["tensor_cores"] or ""),
    ("16-byte loads", lambda row: str(row["wide_loads"])),
    ("stores", lambda row: str(row["wide_stores"])),
    ("variant", lambda row: row["variant"] or ""),
]


def roofline_columns():
    from lowrank_sys.bench.static import cards

    def of(card):
        return lambda row: f"{report.seconds(row[f'{card} computed_s'])} {row[f'{card} bound']}"

    return [
        ("op", lambda row: row["op"]),
        ("bytes", lambda row: report.size(row["bytes"])),
        ("GFLOP", lambda row: report.number(row["flop"] / 1e9)),
        *((card, of(card)) for card in cards.CARDS),
        ("not counted", lambda row: row["besides"] or ""),
    ]


def run(args):
    try:
        from lowrank_sys.bench.static import cases
    except ImportError as error:
        raise CommandError(f"triton is not installed ({error}): pip install triton") from None
    unknown = sorted(set(args.arch or ()) - set(cases.ARCHS))
    if unknown:
        raise CommandError(f"--arch {unknown[0]}: unknown; valid: {', '.join(map(str, cases.ARCHS))}")
    shapes.check_rank(args.rank, *args.shape)
    known = list(dict.fromkeys([*cases.KERNELS, *OPS, *_sources()]))
    for wish in args.op or ():
        if not any(wish in name for name in known):
            raise CommandError(f"--op {wish}: no kernel's or op's name contains it; known: {', '.join(known)}")
    out = report.Report(args, machine.describe("cpu"))
    with out.console.status("compiling") as status:
        rows = [*triton_rows(args, status.update), *cuda_rows(args, status.update, out.say)]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        out.table(f"{kernel}\n", BUILD_COLUMNS, sorted((row for row in rows if row["kernel"] == kernel), key=_order))
    rooflines = list(roofline_rows(args))
    if rooflines:
        m, n = args.shape
        out.table(
            f"rooflines of {m}x{n}, r = {args.rank}, {args.dtype}: computed from published figures, not measured",
            roofline_columns(),
            rooflines,
        )
    out.write()
    return 0


def _sources():
    from lowrank_sys.bench.static import sources

    return sources.names()


def _order(row):
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", row["configuration"])], row["arch"]
