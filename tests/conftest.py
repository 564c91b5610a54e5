"""What each lane proved, in a line at its end; counted over the processes that a lane is spread over."""

import collections
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # names of models and data sets are those of folders: nobody waits for a network
SEEN = collections.defaultdict(set)  # what -> keys, plain tuples


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what takes long and seldom breaks, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long and seldom breaks; runs with --full")
    if config.getoption("--full"):
        os.environ.setdefault("LOWRANK_FUZZ", "25")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="module")
def one_thread():
    """Sums are the same to the bit in this process and in those that it starts."""
    from threads import threads  # not every lane needs torch

    with threads(1):
        yield


@pytest.fixture(scope="session")
def count():
    """count(what, *key) for the lane's last line."""
    return lambda what, *key: SEEN[what].add(key)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seen"] = {what: list(keys) for what, keys in SEEN.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for what, keys in getattr(node, "workeroutput", {}).get("seen", {}).items():
        SEEN[what].update(map(tuple, keys))


def numbers(keys, i):
    """How many different i-th entries."""
    return len({key[i] for key in keys})


def names(keys, i):
    return ", ".join(sorted({str(key[i]) for key in keys}, key=lambda name: (len(name), name)))


SUMMARIES = {
    "op": lambda k: (
        f"cpu: {numbers(k, 0)} ops x {numbers(k, 1)} backends ({names(k, 1)}), each against random legal calls; "
        f"{len(SEEN['refused'])} against spoiled ones"
    ),
    "launch": lambda k: (
        f"interpret: {numbers(k, 0)} kernels, {len(k)} configurations against the oracle; "
        f"{len(SEEN['traffic'])} of them with the bytes they move counted"
    ),
    "block": lambda k: (
        f"host: {numbers(k, 0)} block algorithms x {numbers(k, 1)} thread counts ({names(k, 1)}) bit for bit; "
        f"sanitizers: {names(SEEN['sanitizer'], 0) or 'none'}"
    ),
}


def pytest_terminal_summary(terminalreporter):
    for what, line in SUMMARIES.items():
        if SEEN[what]:
            terminalreporter.write_line(line(SEEN[what]))
