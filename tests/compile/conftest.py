"""Compilation with no GPU: Triton kernels built for every architecture, their resources and instructions read back."""

import concurrent.futures
import importlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import pytest
import triton

HERE = pathlib.Path(__file__).parent
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Build(NamedTuple):
    """What one compiled kernel needs of the card."""

    shared: int
    threads: int
    registers: int
    stack: int
    local: int
    sass: str


def compile_triton(module, name, types, constants, options, *, arch, sizes):
    """Build kernel `name` of `module` for sm_`arch`.

    types: Triton types of its runtime arguments, a tuple where the argument is one; the rest are constants, or None.
    sizes, as the launcher would find them: "aligned" (multiples of 16), "odd", and "ones" or one "row": Triton bakes a 1 in.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    shape = [size for size in ("m", "n", "r", "channels") if size in types]
    baked = {"ones": shape, "row": [size for size in shape if size == "m"]}.get(sizes, [])
    types = {argument: type_ for argument, type_ in types.items() if argument not in baked}
    constants = constants | dict.fromkeys(baked, 1)
    multiples = ["chunk", *([*shape, "width"] if sizes in ("aligned", "row") else [])]
    # An argument by its index, an entry of a tuple by that of both.
    places = {(names.index(argument), *([i] if isinstance(type_, tuple) else [])): (argument, each)
              for argument, type_ in types.items()
              for i, each in enumerate(type_ if isinstance(type_, tuple) else (type_,))}
    divisible = [place for place, (argument, each) in places.items() if each.startswith("*") or argument in multiples]
    source = ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "constexpr") for argument in names},
        constexprs={argument: constants.get(argument) for argument in names if argument not in types},
        attrs={place: [["tt.divisibility", 16]] for place in divisible},
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Build(compiled.metadata.shared, 32 * options["num_warps"], used["REG"], used["STACK"], used["LOCAL"], sass)


def pytest_collection_modifyitems(items):
    if not triton.knobs.runtime.interpret:
        return
    for item in items:
        if HERE in item.path.parents and "triton" in item.path.name:
            item.add_marker(pytest.mark.skip(reason="kernels are interpreted in this process: unset TRITON_INTERPRET"))


@pytest.fixture(scope="session")
def submit():
    """compile_triton in one of two processes; returns a future."""
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        yield lambda **arguments: pool.submit(compile_triton, **arguments)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def builds(request, submit):
    """Future builds of every selected case, all begun at once."""
    cases = [item.callspec.params["case"] for item in request.session.items if "builds" in getattr(item, "fixturenames", ())]
    return {case: submit(**case.arguments()) for case in cases}


PROVEN = []


@pytest.fixture(scope="session")
def proven():
    """Cases that passed, for the summary."""
    return PROVEN


def pytest_terminal_summary(terminalreporter):
    if PROVEN:
        kernels, rows, archs = ({getattr(case, name) for case, _ in PROVEN} for name in ("kernel", "row", "arch"))
        most = max(build.registers for _, build in PROVEN)
        shared = max(build.shared for _, build in PROVEN) / 1024
        terminalreporter.write_line(
            f"triton: {len(PROVEN)} builds of {len(kernels)} kernels, {len(rows)} configurations, {len(archs)} architectures: "
            f"no spills, at most {most} registers and {shared:.0f} KiB of shared memory")
