"""A dozen small calls under compute-sanitizer: accesses outside of memory."""

from lowrank_sys.bench.device import tool


def run(setting):
    sanitizer = tool.installed("compute-sanitizer", setting)
    options = [*sanitizer, "--tool", "memcheck", "--error-exitcode", "9"] if sanitizer else []
    # every tensor an allocation of its own, so that an access behind its end is seen
    tool.expect(setting, [*options, *tool.ourselves(setting, "small-calls")], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
