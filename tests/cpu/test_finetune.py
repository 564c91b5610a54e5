"""`lowrank train --from`: a checkpoint and a chat file in, a model that plain transformers loads out."""

import json
import re
import shutil

import pytest
import torch
from test_chats import chat, tokenizer, written
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowrank_sys import cli
from lowrank_sys.memory import process
from lowrank_sys.nn import quantized_from_pretrained

FLAGS = (
    "--seq-len 32 --batch-size 2 --steps 6 --eval-steps 3 --eval-tokens 256 --save-steps 3 --rank 8 --update-proj-gap 2 --lr 1e-2 "
    "--device cpu --dtype fp32"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    made = tokenizer()
    made.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=104, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data") / "chat.jsonl", [chat(i % 9) for i in range(9)])


def train(base, chats, out, *more, command="train"):
    return cli.main([command, "--from", str(base), "--data", chats, "--out", str(out), *FLAGS.split(), *more])


def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("method", ["galore", "q-galore", "apollo-mini"])
def test_the_answers_are_learned_and_final_loads_in_plain_transformers(base, chats, tmp_path, method):
    more = {"q-galore": ["--merge-dtype", "fp32"], "apollo-mini": ["--rank", "1"]}.get(method, [])
    assert train(base, chats, tmp_path / "run", "--method", method, "--steps", "12", *more) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.config.use_cache and type(model) is LlamaForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template == tokenizer().chat_template
    before = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert summary(tmp_path / "run")["tokens"] < 12 * 2 * 32  # of documents alone


def test_int8_weights_stay_int8_without_a_merge(base, chats, tmp_path):
    assert train(base, chats, tmp_path / "a", "--method", "q-galore") == 0
    model = quantized_from_pretrained(tmp_path / "a" / "final")
    assert any(name.endswith("codes") for name, _ in model.named_buffers())
    # and go on from there
    assert train(tmp_path / "a" / "final", chats, tmp_path / "b", "--method", "q-galore") == 0


def test_a_run_that_was_cut_goes_on_as_if_never_stopped(base, chats, tmp_path):
    assert train(base, chats, tmp_path / "whole") == 0
    assert train(base, chats, tmp_path / "cut", "--steps", "6", "--save-steps", "3") == 0
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "cut" / "step-00000006")
    (tmp_path / "metrics.jsonl").rename(tmp_path / "cut" / "metrics.jsonl")
    assert train(base, chats, tmp_path / "cut", "--resume") == 0
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "final").state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert summary(tmp_path / "whole")["val_loss"] == summary(tmp_path / "cut")["val_loss"]


def test_packed_or_not_the_first_loss_is_the_same(base, chats, tmp_path):
    """Validation is over all held-out answers in both; so is a batch of everything."""
    losses = []
    for name, more in (("packed", []), ("single", ["--no-packing"])):
        assert train(base, chats, tmp_path / name, "--steps", "1", "--valid-data", chats, "--eval-tokens", "100000", *more) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append(rows[0]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_plan_of_it(base, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "measure", lambda args: process.Baseline(2**30, 2**30, True))
    assert train(base, chats, tmp_path / "p", "--json", command="plan") == 0
    plan = json.loads(capsys.readouterr().out)
    weights = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert weights <= plan["tensors"]["weights"] <= weights + 4096


@pytest.mark.parametrize("more, wanted", [
    (["--model", "llama-1m"], "--model llama-1m: --from"),
    (["--seq-len", "128"], "--seq-len 128: .* knows positions up to 64"),
    (["--merge-dtype", "int4"], "--merge-dtype: unknown 'int4'"),
    (["--seq-len", "2"], "nothing is learned of the first --seq-len 2 tokens"),
], ids=str)  # fmt: skip
def test_bad_input(base, chats, tmp_path, capsys, more, wanted):
    assert train(base, chats, tmp_path / "x", *more) == 2
    assert re.search(wanted, capsys.readouterr().err)


def test_what_is_no_checkpoint(chats, tmp_path, capsys):
    assert train(tmp_path / "none", chats, tmp_path / "x") == 2
    assert "none" in capsys.readouterr().err
    assert cli.main(["train", "--no-packing", "--out", str(tmp_path / "y")]) == 2
    assert "--no-packing needs --from" in capsys.readouterr().err
