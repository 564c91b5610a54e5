"""`lowrank bench quality`: how the best rate is found, what is run beside it, what is not run twice, and what the rows say."""

import argparse
import json
import math

import pytest
import torch

from lowrank_sys import cli
from lowrank_sys.bench import quality, runs, step_times, verdicts
from lowrank_sys.cli import CommandError
from lowrank_sys.nn.quant_weight import is_quantized
from lowrank_sys.train.methods import METHODS

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
IDS = torch.arange(32).view(1, 32)
SHORT = ["--batch-size", "1", "--seq-len", "16", "--eval-tokens", "32", "--data"]


@pytest.fixture
def tiny(tmp_path):
    """(path of a model, flags of a short run)"""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return str(tmp_path / "tiny.json"), [*SHORT, str(tmp_path / "text.txt")]


def plan(*words):
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return quality.Plan(parser.parse_args(words))


def value(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


def values(p):
    return p.codes.float() if is_quantized(p) else p.detach().clone()


class Landscape:
    """In place of runs: a loss that is least at a rate and a plain rate."""

    def __init__(self, lr, plain_lr=3e-3):
        self.least, self.seen = (lr, plain_lr), []

    def __call__(self, words):
        self.seen.append(words)
        rates = float(value(words, "--lr")) or 1e-9, float(value(words, "--plain-lr"))
        return {"val_loss": 2 + sum(math.log(rate / least) ** 2 for rate, least in zip(rates, self.least))}


@pytest.mark.parametrize(
    "rates, least, found, tried",
    [
        (5, 5e-3, 5e-3, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]),
        (3, 5e-3, 5e-3, [2e-3, 5e-3, 1e-2]),
        (3, 2e-2, 2e-2, [2e-3, 5e-3, 1e-2, 2e-2, 5e-2]),  # an end that is best is gone beyond
        (5, 2e-4, 2e-4, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-4, 2e-4, 1e-4]),
        (5, 9.0, 5.0, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]),  # the grid ends
    ],
)
def test_rates_that_a_method_has(rates, least, found, tried):
    landscape, of = Landscape(least), {"tried": {}}
    quality.choose(plan("--rates", str(rates)), landscape, "galore", of)
    assert [float(value(words, "--lr")) for words in landscape.seen] == tried
    assert of["best"] == (found, 1e-2) and list(of["tried"]) == [(lr, 1e-2) for lr in tried]


def test_what_is_no_matrix_has_one_rate_where_adam_trains_it():
    assert {name: plan("--plain-lr", "7e-3").plain_lr(name) for name in ("adamw", "muon", "fira-lion", "flora")} == {
        "adamw": 7e-3, "muon": 7e-3, "fira-lion": METHODS["fira-lion"].plain_lr, "flora": METHODS["flora"].plain_lr
    }  # fmt: skip


def test_a_run_that_diverges_is_never_the_best():
    of = {"tried": {}}
    quality.choose(plan(), lambda words: {"val_loss": None if value(words, "--lr") != "0.002" else 9.0}, "galore", of)
    assert of["best"][0] == 2e-3


@pytest.mark.full
def test_methods_that_train_all_else_alike_are_frozen_alike(tiny, tmp_path):
    chosen = plan("--model", tiny[0], "--rank", "4", "--steps", "3", "--", *tiny[1])
    run, alike = runs.Runs(tmp_path / "rows.jsonl", 1.0, print), {}
    for name in ("adamw", "apollo", "fira", "galore", "gum", "lisa", "owlore", "scale", "subtrack"):
        row = run(chosen.words(name, 0, 1e-2, 0))
        assert alike.setdefault(quality.rest(chosen, name), row["val_loss"]) == row["val_loss"]
    assert 3 <= len(alike) < 9


def test_what_runs_beside_the_best(tiny):
    chosen = plan("--model", tiny[0], "--methods", "galore,ldadam,muon,apollo,grass", "--rank", "4", "--gap", "7", "--", *tiny[1])
    assert chosen.methods == ["adamw", "apollo", "galore", "grass", "ldadam", "muon"]
    found = {name: {"tried": {}, "own": {}, "frozen": {}, "random": {}} for name in chosen.methods}
    landscape = Landscape(5e-3)
    quality.sweep(chosen, landscape, found)
    assert all(list(of["own"]) == [0, 1, 2] and list(of["frozen"]) == [0] for of in found.values())
    assert [name for name, of in found.items() if list(of["random"]) == [0, 1, 2]] == ["galore", "grass", "ldadam"]
    assert not any(found[name]["random"] for name in ("adamw", "apollo", "muon"))
    bases = {
        value(w, "--method"): (value(w, "--subspace"), value(w, "--update-proj-gap")) for w in landscape.seen if "--subspace" in w
    }
    assert bases == {"galore": ("random", "7"), "ldadam": ("random", "7"), "grass": ("uniform", "7")}
    frozen = [words for words in landscape.seen if value(words, "--lr") == "0"]
    assert [value(words, "--method") for words in frozen] == ["adamw"] * 1 + ["apollo"] + ["adamw"] * 2 + ["ldadam", "adamw"]


def test_flags_of_a_run():
    chosen = plan("--rank", "8", "--gap", "32", "--steps", "9", "--", "--batch-size", "2")
    galore = chosen.words("galore", 5e-3, 3e-3, 1)
    assert value(galore, "--rank") == "8" and value(galore, "--update-proj-gap") == "32" and galore[-2:] == ["--batch-size", "2"]
    for name in ("adamw", "muon", "apollo-mini"):  # without a subspace, or of a rank that is its idea
        assert "--rank" not in chosen.words(name, 1e-2, 3e-3, 0)
    assert "--update-proj-gap" not in chosen.words("coap", 5e-3, 3e-3, 0)  # its own gap is shorter


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_of_zero_freezes_the_matrices(tiny, name):
    model, optimizer = step_times.built(plan("--model", tiny[0], "--rank", "4").words(name, 0, 3e-3, 0))
    matrices = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    matrices = matrices or optimizer.param_groups[1]["params"]
    assert len(matrices) == (9 if name == "scale" else 7)  # whose matrices are all there are
    before = [values(p) for p in matrices]
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, was in zip(matrices, before):  # of a matrix in two factors, to rounding
        torch.testing.assert_close(values(p), was, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_random_basis_serves_whoever_has_one(tiny, name):
    chosen = plan("--model", tiny[0], "--rank", "4", "--gap", "2")
    if basis := quality.random_basis(chosen.words(name, 1e-3, 3e-3, 0)):
        model, optimizer = step_times.built(chosen.words(name, 1e-3, 3e-3, 0, basis))
        for _ in range(5):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.isfinite().all() for p in model.parameters() if not is_quantized(p))


def test_nothing_runs_twice(tiny, tmp_path):
    path, told = tmp_path / "deep" / "rows.jsonl", []
    words = ["--model", tiny[0], "--method", "galore", "--rank", "4", "--steps", "2", *tiny[1]]
    first = runs.Runs(path, 1.0, told.append)
    row = first(words)
    assert math.isfinite(row["val_loss"]) and row["optimizer_state_bytes"] > 0 and row["seconds"] > 0
    assert "rank must be at most" in first([*words, "--rank", "4000"])["refused"]
    with pytest.raises(CommandError, match="another process is writing there"):
        runs.Runs(path, 1.0, told.append)
    first._file.write('{"command": "lowrank tr')  # what a process leaves that is killed while it writes
    first._file.close()

    again = runs.Runs(path, 0.0, told.append)
    assert again(words) == row and len(again.rows) == 2 and len(told) == 2
    assert path.read_text().count("\n") == 2 and path.read_text().endswith("\n")
    with pytest.raises(runs.OutOfTime):
        again([*words, "--seed", "1"])


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(CommandError, match="it is no file of such runs"):
        runs.Runs(tmp_path / "rows.jsonl", 1.0, print)


def test_step_times(tiny):
    chosen = plan("--model", tiny[0], "--rank", "4", "--", *tiny[1])
    words = {name: chosen.words(name, 1e-3, 3e-3, 0) for name in ("adamw", "galore", "lisa", "q-galore")}
    found = step_times.measure(words, rounds=3, warm=1)
    assert list(found) == list(words) and all(seconds > 0 for seconds in found.values())


def made(losses, state=100):
    return {seed: {"val_loss": loss, "optimizer_state_bytes": state} for seed, loss in enumerate(losses)}


FOUND = {
    "adamw": {"best": (3e-4, 1e-2), "tried": {(3e-4, 1e-2): 2.0}, "own": made([2.0, 3.0]), "frozen": made([5.0]), "random": {}},
    "galore": {
        "best": (5e-3, 3e-3), "tried": {(5e-3, 3e-3): math.inf}, "own": made([1.9, 2.9], 50), "frozen": made([1.0]),
        "random": made([1.8, 3.1]),
    },
    "sara": {"best": (5e-3, 3e-3), "tried": {}, "own": made([1.8, 3.0]), "frozen": {}, "random": {0: {"refused": "moments must"}}},
    "snsm": {"best": (5e-3, 3e-3), "tried": {}, "own": made([None, 3.0]), "frozen": {}, "random": {}},
}  # fmt: skip


def test_rows():
    rows = verdicts.rows(FOUND, {"adamw": 2.0, "galore": 3.0})
    assert [row["method"] for row in rows] == ["galore", "sara", "adamw", "snsm"]
    galore = rows[0]
    assert galore["val_loss"] == pytest.approx(2.4) and galore["step_over_adamw"] == 1.5 and galore["tried"] == [[5e-3, 3e-3, None]]
    assert galore["over_adamw"] == {"mean": pytest.approx(-0.1), "deviation": pytest.approx(0), "lower": 2, "seeds": 2}
    assert verdicts.answer(galore["over_frozen"]) == "no (0 of 1)" and verdicts.answer(galore["over_random"]) == "open (1 of 2)"
    text = {row["method"]: {head: text(row) for head, text in verdicts.COLUMNS} for row in rows}
    assert text["snsm"]["validation loss, nats a token"] == "diverged or not run"
    assert text["sara"]["over itself on a random basis"] == "refused" and text["adamw"]["over itself on a random basis"] == ""
    assert json.loads(json.dumps(rows))[0]["losses"] == {"0": 1.9, "1": 2.9}


def test_claims():
    found = {(row["method"], row["peer"]): verdicts.answer(row["off"]) for row in verdicts.claims(FOUND)}
    assert found == {("sara", "galore"): "open (1 of 2)", ("snsm", "adamw"): "not run", ("snsm", "galore"): "not run"}
    unknown = verdicts.CLAIMS.keys() - METHODS.keys()
    assert not unknown and {peer for peers, _ in verdicts.CLAIMS.values() for peer in peers} == set(verdicts.PEERS)


@pytest.mark.full
def test_the_whole_command(tiny, tmp_path, capsys):
    files = ["--out", str(tmp_path / "rows.jsonl"), "--json", str(tmp_path / "table.json"), "--plot", str(tmp_path / "bars.png")]
    argv = ["bench", "quality", "--model", tiny[0], "--methods", "galore", "--seeds", "0,1", "--steps", "2", "--rank", "4"]
    argv += [*files, "--", *tiny[1]]
    assert cli.main([*argv[:2], "--hours", "0", *argv[2:]]) == 0
    assert "what is missing in the table was not run" in capsys.readouterr().out
    assert cli.main(argv) == 0
    said, kept = capsys.readouterr().out, (tmp_path / "rows.jsonl").read_text()
    assert said.count("lowrank train ") == len(kept.splitlines()) - 1 >= 2 * (6 + 1 + 1) + 2  # one is of step times
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["method"] for row in rows} == {"adamw", "galore"} and all(row["step_seconds"] > 0 for row in rows)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")

    assert cli.main(argv) == 0
    assert "lowrank train " not in capsys.readouterr().out and (tmp_path / "rows.jsonl").read_text() == kept


@pytest.mark.parametrize(
    "change, message",
    [
        (["--methods", "galore,adma"], "--methods: unknown 'adma'"),
        (["--seeds", "0,x"], "--seeds: got '0,x'"),
        (["--rank", "0"], "--rank: got 0; it must be at least 1"),
        (["--", "--lr", "3"], "--lr: lowrank bench quality sets it itself"),
    ],
)
def test_bad_input(change, message, capsys):
    assert cli.main(["bench", "quality", *change]) == 2 and message in capsys.readouterr().err
