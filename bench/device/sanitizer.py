"""A dozen small calls under compute-sanitizer: accesses outside of memory, and races."""

from lowrank_sys.bench.device import tool

TOOLS = ("memcheck", "racecheck")


def run(setting):
    sanitizer = tool.installed("compute-sanitizer", setting)
    for name in TOOLS:
        options = [*sanitizer, "--tool", name, "--error-exitcode", "9"] if sanitizer else []
        # every tensor an allocation of its own, so that one behind its end is seen
        tool.expect(setting, [*options, *tool.ourselves(setting, "small-calls")], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
