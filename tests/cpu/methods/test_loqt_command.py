"""LoQT from the command line: it trains, goes on to the bit, is planned as it runs, and leaves what plain transformers reads."""

import argparse
import json
import shutil

import pytest
import torch
from commanded import exact, rows
from lanes import usual
from transformers import AutoModelForCausalLM

from lowrank_sys import cli
from lowrank_sys.memory import rehearsal
from lowrank_sys.nn import QuantLinear, quantized_from_pretrained
from lowrank_sys.train import flags

SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
         "vocab_size": 256, "tie_word_embeddings": False}  # fmt: skip
IDS = torch.arange(40)[None]


def words(tmp_path, *more, **changed):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "a.txt").write_text("some words to train on, and some more " * 50)
    values = {"model": tmp_path / "config.json", "method": "loqt", "rank": 8, "steps": 7, "update_proj_gap": 2, "batch_size": 2,
              "seq_len": 32, "eval_tokens": 64, "save_steps": 4, "lr": 2e-2, "device": "cpu", **changed}  # fmt: skip
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), *more]


def run(tmp_path, out, *more, **changed):
    data = ["--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / out), "--as-given"]
    assert cli.main(["train", *words(tmp_path, *data, *more, **changed)]) == 0
    return tmp_path / out


@pytest.mark.parametrize("more", usual([{}], {"weights": "int8", "projected": "auto"}), ids=str)
def test_it_trains_and_goes_on_to_the_bit(tmp_path, more):
    whole, cut = run(tmp_path, "whole", **more), run(tmp_path, "cut", **more)
    found, summary = rows(whole), json.loads((whole / "summary.json").read_text())
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.1 and summary["skipped"] == 0
    assert summary["matrices_changed"] == [7, 7] and summary["arguments"]["weights"] == more.get("weights", "nf4")

    for old in ("final", "step-00000007"):
        shutil.rmtree(cut / old)
    (cut / "summary.json").unlink()
    run(tmp_path, "cut", "--resume", **more)
    assert exact(cut) == exact(whole)
    ends = [quantized_from_pretrained(out / "final") for out in (whole, cut)]
    layers = [m for m in ends[0].modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 7 and all(m.part is not None and m.coding.name == more.get("weights", "nf4") for m in layers)
    own, read = (model.state_dict() for model in ends)
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)


def test_what_is_left_is_read_by_plain_transformers(tmp_path):
    out = run(tmp_path, "run", "--merge-dtype", "fp32", steps=3)
    last, plain = quantized_from_pretrained(out / "step-00000003"), AutoModelForCausalLM.from_pretrained(out / "final")
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(plain.eval()(IDS).logits, last(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"weights": "int8", "per_layer": "accumulate"}], ids=str)
def test_it_is_planned_as_it_runs(tmp_path, more):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    args = parser.parse_args(words(tmp_path, "--dtype", "fp32", **more))
    flags.check(args)
    fake, real = rehearsal.rehearse(args), rehearsal.rehearse(args, fake=False)
    assert (fake.peak, fake.rest, fake.at_rest) == (real.peak, real.rest, real.at_rest)


def test_other_methods_refuse_nf4(tmp_path, capsys):
    assert cli.main(["train", *words(tmp_path, "--data", str(tmp_path / "a.txt"), method="galore", weights="nf4")]) == 2
    assert capsys.readouterr().err.count("--weights nf4 needs --method loqt, which trains a part beside them, got") == 1
