"""The compile lane: what `lowrank_sys.bench.static` builds, asserted."""

import pathlib

import pytest
import triton

from lowrank_sys.bench.static import build, cases

HERE = pathlib.Path(__file__).parent
PROVEN = {"triton": [], "cuda": []}  # (kernel, configuration, architecture, Build) of what passed
NOTES = []


def pytest_collection_modifyitems(items):
    if not triton.knobs.runtime.interpret:
        return
    for item in items:
        if HERE in item.path.parents and "cuda" not in item.path.name:
            item.add_marker(pytest.mark.skip(reason="kernels are interpreted in this process: unset TRITON_INTERPRET"))


@pytest.fixture(scope="session")
def submit():
    """compile_triton in one of two processes; returns a future."""
    with build.processes() as submit:
        yield submit


@pytest.fixture(scope="session")
def builds(request, submit):
    """Future builds of every selected case, all begun at once."""
    chosen = [item.callspec.params["case"] for item in request.session.items if "builds" in getattr(item, "fixturenames", ())]
    return {case: submit(**cases.arguments(case)) for case in chosen}


@pytest.fixture(scope="session")
def proven():
    """What passed, for the summary."""
    return PROVEN


@pytest.fixture(scope="session")
def note():
    """Adds a line to the summary: what was measured and is not asserted."""
    return NOTES.append


def pytest_terminal_summary(terminalreporter):
    for line in NOTES:
        terminalreporter.write_line(line)
    for language, passed in PROVEN.items():
        if passed:
            kernels, configurations, archs, built = (set(column) if i < 3 else column for i, column in enumerate(zip(*passed)))
            most, shared = max(b.registers for b in built), max(b.shared for b in built) / 1024
            terminalreporter.write_line(
                f"{language}: {len(passed)} builds proven: {len(kernels)} kernels x {len(configurations)} configurations x "
                f"{len(archs)} architectures: no spills, at most {most} registers and {shared:.0f} KiB of shared memory"
            )
