"""The plan of several devices: shares of rows, and what crosses the wire, against sums over a real model."""

import argparse
import json
import math

import pytest
import torch

from lowrank_sys import cli
from lowrank_sys.memory import devices, process, rehearsal
from lowrank_sys.train import flags, methods, models


def arguments(**changes):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--dtype", "fp32", "--model", "llama-1m", "--rank", "32", "--batch-size", "2"])
    vars(args).update({"nproc": 1, "strategy": "ddp", **changes})
    flags.check(args)
    return args


@pytest.fixture(scope="module")
def run():
    return rehearsal.rehearse(arguments(proj_type="right"))


@pytest.fixture(scope="module")
def model():
    return models.build(models.config("llama-1m", vocab=None, seq_len=128), dtype=torch.float32, device=torch.device("cpu"))


def test_one_device_is_the_rehearsal(run):
    assert devices.spread(run, arguments()) is run
    assert devices.wire(run.layout, arguments()) == {}


@pytest.mark.parametrize("n", [2, 3, 4, 1000, 8192])
def test_fsdp_deals_rows_out(run, model, n):
    """The first device has ⌈rows/n⌉ of each parameter and of R, whose rows are the parameter's."""
    spread = devices.spread(run, arguments(nproc=n, strategy="fsdp"))
    optimizer = methods.build(model, arguments(proj_type="right"))
    weights = sum(4 * math.ceil(p.shape[0] / n) * p.numel() // p.shape[0] for p in model.parameters())
    matrices = {p for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    moments = sum(
        2 * 4 * math.ceil(p.shape[0] / n) * (32 if p in matrices else p.numel() // p.shape[0]) for p in model.parameters()
    )
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert spread.at_rest["weights"] == pytest.approx(weights + buffers, abs=1)
    assert spread.at_rest["moments"] == pytest.approx(moments, abs=1)
    assert spread.at_rest["basis"] == run.at_rest["basis"]
    assert spread.at_peak["activations"] >= run.at_peak["activations"]  # all of them, and the peak may be where there are more
    assert spread.peak == sum(spread.at_peak.values())


def test_fsdp_gathers_layers_and_keeps_the_rest(run, model):
    spread = devices.spread(run, arguments(nproc=4, strategy="fsdp"))
    size = lambda module: sum(p.numel() * 4 for p in module.parameters())  # noqa: E731
    layer = size(model.model.layers[0])
    rest = size(model) - size(model.model.layers)
    assert spread.at_peak["gathered"] == 2 * rest + 4 * layer and "gathered" not in spread.at_rest
    wire = devices.wire(run.layout, arguments(nproc=4, strategy="fsdp", gradient_accumulation_steps=2))
    assert wire["gathered weights"] == 2 * (2 * size(model.model.layers) + rest)
    assert wire["scattered gradients"] == 2 * size(model)


def test_ddp_reduces_whole_gradients_or_low_rank_ones(run, model):
    dense = devices.wire(run.layout, arguments(nproc=2))
    assert dense == {"gradients": sum(p.numel() * 4 for p in model.parameters()), "sent": dense["gradients"]}
    assert devices.spread(run, arguments(nproc=2)).at_peak["buckets"] == dense["gradients"]
    low = devices.wire(run.layout, arguments(nproc=2, per_layer="accumulate"))
    matrices = [p for name, p in model.named_parameters() if "_proj" in name]
    assert low["gradients"] == dense["gradients"] - sum(p.numel() * 4 for p in matrices)
    assert low["low-rank gradients"] == sum(4 * 32 * p.shape[0] for p in matrices)
    assert low["refreshes"] == pytest.approx(sum(4 * p.shape[1] * (40 + 32) for p in matrices) / 200)
    half = devices.wire(run.layout, arguments(nproc=2, per_layer="accumulate", accumulate_dtype="bf16"))
    assert half["low-rank gradients"] == low["low-rank gradients"] / 2
    assert devices.wire(run.layout, arguments(nproc=4))["sent"] == 1.5 * dense["gradients"]


FLAGS = "plan --model llama-1m --method galore --rank 32 --batch-size 2 --seq-len 32 --device cpu --dtype fp32 --device-memory 8GiB"


def test_the_command_says_it(capsys, monkeypatch):
    monkeypatch.setattr(process, "measure", lambda args: process.Baseline(2**30, 2**30, True))
    assert cli.main([*FLAGS.split(), "--nproc", "4", "--strategy", "fsdp", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["nproc"], plan["strategy"], plan["fits"]) == (4, "fsdp", True)
    assert set(plan["wire_bytes_per_step"]) == {"gathered weights", "scattered gradients", "refreshes", "sent"}
    assert cli.main([*FLAGS.split(), "--nproc", "2"]) == 0
    told = capsys.readouterr().out
    assert "each of 2 by ddp" in told and "on the wire in a step: gradients" in told


@pytest.mark.parametrize("more, wanted", [
    ("--nproc 0", "--nproc: got 0; it must be at least 1"),
    ("--strategy fdsp", "--strategy: unknown 'fdsp'; valid: ddp, fsdp"),
    ("--nproc 2 --per-layer in_backward", "--per-layer in_backward is for one process, got --nproc 2 --strategy ddp"),
    ("--nproc 2 --strategy fsdp --per-layer accumulate", "--per-layer accumulate is for one process"),
])  # fmt: skip
def test_bad_input(more, wanted, capsys):
    assert cli.main([*FLAGS.split(), *more.split()]) == 2
    assert wanted in capsys.readouterr().err
