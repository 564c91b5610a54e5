"""Counts which block algorithms ran on how many threads."""

import inspect

import pytest


@pytest.fixture(autouse=True)
def counted(monkeypatch, count):
    """Calls of `_host`, whose first argument is the number of threads where a block runs."""
    host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

    def wrap(name, function):
        def call(*arguments, **options):
            if arguments and isinstance(arguments[0], int):
                count("block", name, arguments[0])
            return function(*arguments, **options)

        return call

    for name, function in vars(host).copy().items():
        if inspect.isbuiltin(function):
            monkeypatch.setattr(host, name, wrap(name, function))
