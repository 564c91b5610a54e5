"""Triton kernels built for any architecture with no GPU, their resources and instructions read back."""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = r"\b(HMMA|HGMMA|QMMA|IMMA|IGMMA|UTC\w*MMA)"
# Architectures with tensor-core instructions of their own.
OWN_TENSOR_CORE = {90: r"\b(HGMMA|IGMMA)", 100: r"\b(UTC\w*MMA)"}


class Build(NamedTuple):
    """What one compiled kernel needs of the card, and its instructions."""

    shared: int
    threads: int
    registers: int
    stack: int
    local: int
    sass: str
    tensor_memory: int = 0  # columns, of sm_100

    @property
    def tensor_cores(self):
        """Names of the tensor-core instructions."""
        return sorted(set(re.findall(TENSOR_CORE, self.sass)))

    def wide(self, instruction):
        """How many of `instruction` (LDG, LDGSTS, STG) move 16 bytes."""
        return len(re.findall(rf"\b{instruction}\.\S*128", self.sass))


def resources(usage):
    """{'REG': ..., 'STACK': ..., 'LOCAL': ...} of a line of cuobjdump -res-usage."""
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


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
    places = {
        (names.index(argument), *([i] if isinstance(type_, tuple) else [])): (argument, each)
        for argument, type_ in types.items()
        for i, each in enumerate(type_ if isinstance(type_, tuple) else (type_,))
    }
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
    used = resources(usage)
    return Build(
        compiled.metadata.shared,
        32 * options["num_warps"],
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        sass,
        compiled.metadata.tmem_size,
    )


@contextlib.contextmanager
def processes(workers=2):
    """A function that takes compile_triton's arguments and returns a future: two builds at a time."""
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            yield lambda **arguments: pool.submit(compile_triton, **arguments)
        finally:
            pool.shutdown(cancel_futures=True)
