"""`--option`: arguments of a method's optimizer from the command line."""

import argparse

import pytest

from lowrank_sys.cli import CommandError
from lowrank_sys.train import flags, methods, models


def built(*words):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(["--model", "llama-1m", *words])
    flags.check(args)
    return methods.build(models.build(models.config("llama-1m", vocab=None, seq_len=32), dtype=None, device="cpu"), args)


def test_an_argument_reaches_the_optimizer():
    lisa = built("--method", "lisa", "--option", "active_layers=2", "period=7")
    assert {group["active_layers"] for group in lisa.param_groups} == {2} and lisa.param_groups[1]["period"] == 7
    galore = built("--method", "galore", "--option", "betas=(0.8, 0.99)", "nonfinite=raise")
    assert galore.param_groups[1]["betas"] == (0.8, 0.99) and galore.nonfinite == "raise"


@pytest.mark.parametrize(
    "method, option, message",
    [
        ("lisa", "period=0", "period must be an integer of at least 1, got 0"),
        ("lisa", "perod=3", "LISA takes .*, got perod"),
        ("galore", "period=3", "--option: .*unexpected keyword argument 'period'"),
        ("galore", "period", "--option: got 'period'; it must be NAME=VALUE"),
        ("galore", "lr=3", "--option: lr must be given by the flags of that name"),
    ],
)
def test_refused(method, option, message):
    with pytest.raises(CommandError, match=message):
        built("--method", method, "--option", option)
