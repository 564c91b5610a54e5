"""`lowrank train` from its flags to its files, on a llama-1m and a few modules of the Python library."""

import json
import math
import sys

import pytest
import torch
from commanded import final, modules, rows, words
from test_checkpoint import flip, full_disk

from lowrank_sys import cli
from lowrank_sys.train import command, models
from lowrank_sys.train import flags as train_flags

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "--model": "llama-1m", "--method": "galore", "--rank": "8", "--steps": "8", "--batch-size": "2", "--seq-len": "32",
    "--update-proj-gap": "3", "--eval-steps": "4", "--save-steps": "2", "--eval-tokens": "256", "--device": "cpu",
    "--warmup-steps": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return modules(
        tmp_path_factory.mktemp("text"),
        "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "copy", "csv", "datetime", "difflib", "dis",
        "enum", "fnmatch", "heapq", "inspect", "shlex", "shutil", "string", "textwrap", "this",
    )  # fmt: skip


def flags(text, out, *more, **changed):
    return words({**SMALL, "--data": str(text), "--out": str(out)}, *more, **changed)


def train(given):
    return cli.main(["train", *given])


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(flags(text, out)) == 0
    return out


def test_files(text, whole):
    from transformers import AutoModelForCausalLM

    from lowrank_sys.train import data, trainer

    found = rows(whole)
    assert [row["step"] for row in found] == list(range(9))
    assert [row["step"] for row in found if row["val_loss"] is not None] == [0, 4, 8]
    assert all(row["loss"] > 0 and row["tokens_per_second"] > 0 and row["lr"] > 0 for row in found[1:])
    assert sorted(p.name for p in whole.iterdir()) == [
        ".lock", "final", "loss.png", "metrics.jsonl", "step-00000006", "step-00000008", "summary.json",
    ]  # fmt: skip
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tokens"] == 8 * 2 * 32 and summary["steps"] == 8 and summary["skipped"] == 0
    assert summary["model"] == "llama-1m" and summary["method"] == "galore" and summary["seed"] == 0
    assert 0 < summary["optimizer_state_bytes"] < 0.5 * summary["adamw_state_bytes"]
    assert summary["peak_memory_bytes"] > 2**27 and "torch" in summary["machine"]
    assert found[-1]["val_loss"] == summary["val_loss"] < found[0]["val_loss"] - 0.3

    # the losses are those of the final weights, as anyone who loads them finds
    corpus = data.load(str(text), seq_len=32)
    model = AutoModelForCausalLM.from_pretrained(whole / "final")
    valid, seen = (data.Windows(stream, 32, 0, 0).sample(256) for stream in (corpus.valid, corpus.train))
    assert summary["val_loss"] == pytest.approx(trainer.mean_loss(model, valid, 3), rel=1e-5)
    assert summary["train_loss"] == pytest.approx(trainer.mean_loss(model, seen, 3), rel=1e-5)
    assert summary["unigram_entropy"] == pytest.approx(data.unigram_entropy(corpus.train, valid["labels"][:, 1:], 256))


def test_resume_after_damage_and_past_the_end(text, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(flags(text, out, method="adamw", steps=6)) == 0
    first = final(out)
    flip(out / "step-00000006" / "optimizer.pt")
    assert train(flags(text, out, "--resume", method="adamw", steps=6)) == 0
    said = capsys.readouterr().err
    assert "skipped checkpoint" in said and "optimizer.pt is damaged" in said and "resuming at step 4" in said
    assert final(out) == first

    assert train(flags(text, out, "--resume", method="adamw", steps=6)) == 0  # nothing left to do
    assert final(out) == first and [row["step"] for row in rows(out)] == list(range(7))
    assert train(flags(text, out, "--resume", method="adamw", steps=9)) == 0
    assert final(out) != first and [row["step"] for row in rows(out)] == list(range(10))


def fails(capsys, given, code, *parts):
    capsys.readouterr()
    assert train(given) == code
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("lowrank train: error: ")]
    assert len(errors) == 1 and errors[0] == said[-1], said
    for part in parts:
        assert part in errors[0], errors[0]


def test_resume_refuses_another_run(text, whole, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for changed, part in [
        ({"model": "llama-9m"}, "--model llama-1m there, llama-9m here"),
        ({"method": "adamw"}, "--method galore there, adamw here"),
        ({"rank": 4}, "--rank 8 there, 4 here"),
        ({"lr": 0.1}, "--lr 0.005 there, 0.1 here"),
        ({"steps": 7}, "it must be at least 8"),
    ]:
        fails(capsys, flags(text, whole, "--resume", **changed), 2, part)
    fails(capsys, flags(text, whole), 2, "it holds a run already", "--resume")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before

    data = tmp_path / "data.txt"
    data.write_bytes((text / "argparse.py").read_bytes())
    assert train(flags(data, tmp_path / "run", steps=1)) == 0
    data.write_text(data.read_text() + "more")
    fails(capsys, flags(data, tmp_path / "run", "--resume", steps=1), 2, "the text behind --data", "has changed")


def test_resume_without_a_checkpoint_starts_anew(text, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')  # killed before its first checkpoint
    assert train(flags(text, tmp_path / "run", "--resume", steps=1)) == 0
    assert "no checkpoint" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


@pytest.mark.full
def test_full_disk(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(flags(text, out, steps=2)) == 0
    kept = (out / "step-00000002" / "model.safetensors").read_bytes()
    with full_disk(10**6):
        fails(capsys, flags(text, out, "--resume", steps=4), 1, "could not save the checkpoint of step 4")
    assert (out / "step-00000002" / "model.safetensors").read_bytes() == kept and not list(out.glob(".partial*"))
    assert train(flags(text, out, "--resume", steps=4)) == 0
    with full_disk(150):
        fails(capsys, flags(text, tmp_path / "other", steps=4, save_steps=4), 1, "could not write metrics.jsonl")


@pytest.mark.parametrize("flag, value, parts", [
    ("model", "llama-2m", ["--model: unknown 'llama-2m'; valid: llama-1m, llama-9m,", "llama-13b"]),
    ("method", "sgd", ["--method: unknown 'sgd'; valid: adamw, adamw8bit, apollo"]),
    ("dtype", "fp8", ["--dtype: unknown 'fp8'; valid: auto, fp32, bf16"]),
    ("device", "tpu", ["--device: unknown 'tpu'; valid: auto, cpu, cuda"]),
    ("subspace", "lucky", ["lucky", "randomized"]),
    ("proj_type", "up", ["up", "std"]),
    ("steps", 0, ["--steps: got 0; it must be at least 1"]),
    ("seq_len", 1, ["--seq-len: got 1; it must be at least 2"]),
    ("lr", "nan", ["--lr: got nan"]),
    ("rank", 193, ["model.layers.0.self_attn.q_proj.weight", "193", "192"]),
    ("data", "missing/file", ["--data missing/file: no such file or folder; valid: python-stdlib"]),
    ("seq_len", 10**7, ["--seq-len 10000000 needs at least"]),
])  # fmt: skip
def test_bad_flags(text, tmp_path, capsys, monkeypatch, flag, value, parts):
    monkeypatch.chdir(tmp_path)
    fails(capsys, flags(text, tmp_path / "run", **{flag: value}), 2, *parts)
    assert not list(tmp_path.glob("run/*")) or [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def poison(monkeypatch, name, index, steps):
    """Put a NaN into one element of a gradient, as autograd hands it over, in these steps."""
    build, made = models.build, []

    def build_with_hook(*args, **kwargs):
        model = build(*args, **kwargs)
        made.append({n: p.detach().clone() for n, p in model.named_parameters()})
        step = iter(range(1, 10**6))

        def hook(grad):
            if next(step) in steps:
                grad = grad.clone()
                grad[index] = math.nan
            return grad

        dict(model.named_parameters())[name].register_hook(hook)
        return model

    monkeypatch.setattr(models, "build", build_with_hook)
    return made


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "final" / "model.safetensors")


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_a_nan_stays_in_its_channel(text, tmp_path, monkeypatch, capsys, grad_clip):
    name = "model.layers.0.self_attn.q_proj.weight"
    made = poison(monkeypatch, name, (5, 7), steps=range(1, 10))
    assert train(flags(text, tmp_path / "run", steps=4, grad_clip=grad_clip)) == 0
    (before,), after = made, weights(tmp_path / "run")
    assert all(w.isfinite().all() for w in after.values())
    # a square weight is projected on the right, so its channels are rows
    assert (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist() == [i for i in range(192) if i != 5]
    assert all((after[n] != before[n]).any() for n in before)
    assert rows(tmp_path / "run")[-1]["skipped"] == 4 * 192
    assert "skipped 768 elements" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "step-00000004" / "optimizer.pt")["state"]
    assert all(t.isfinite().all() for s in state.values() for t in s.values() if isinstance(t, torch.Tensor))


def test_a_nan_in_one_step(text, tmp_path, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"  # (192, 512): projected on the left, column 7 is the channel
    made = poison(monkeypatch, name, (5, 7), steps=[2])
    assert train(flags(text, tmp_path / "run", steps=3)) == 0
    (before,), after = made, weights(tmp_path / "run")
    assert all(w.isfinite().all() and (w != before[n]).any() for n, w in after.items())
    assert [row["skipped"] for row in rows(tmp_path / "run")][-1] == 192


def test_a_nan_with_adamw_leaves_out_its_element(text, tmp_path, monkeypatch):
    poison(monkeypatch, "model.layers.0.self_attn.q_proj.weight", (5, 7), steps=[2])
    assert train(flags(text, tmp_path / "run", steps=3, method="adamw")) == 0
    after = weights(tmp_path / "run")
    assert all(w.isfinite().all() for w in after.values())
    assert rows(tmp_path / "run")[-1]["skipped"] == 1


def test_accumulated_micro_batches_are_one_batch(text, tmp_path):
    plain = {"steps": 3, "method": "adamw", "eval_steps": 1}
    assert train(flags(text, tmp_path / "one", batch_size=4, **plain)) == 0
    assert train(flags(text, tmp_path / "four", batch_size=1, gradient_accumulation_steps=4, **plain)) == 0
    one, four = rows(tmp_path / "one"), rows(tmp_path / "four")
    for a, b in zip(one[1:], four[1:]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)


def test_gradient_checkpointing_and_adafactor(text, tmp_path):
    more = {"method": "galore-adafactor", "steps": 6, "dtype": "bf16"}
    assert train(flags(text, tmp_path / "run", "--gradient-checkpointing", **more)) == 0
    found = rows(tmp_path / "run")
    assert found[-1]["val_loss"] < found[0]["val_loss"]
    assert {w.dtype for w in weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_products_in_int8(text, tmp_path, capsys):
    assert train(flags(text, tmp_path / "run", "--int8-gemm", method="galore", steps=6)) == 0
    found = rows(tmp_path / "run")
    assert found[-1]["val_loss"] < found[0]["val_loss"]
    assert train(flags(text, tmp_path / "fp32", method="galore", steps=6)) == 0
    ours, other = weights(tmp_path / "run"), weights(tmp_path / "fp32")
    assert any(not torch.equal(ours[name], other[name]) for name in ours)
    fails(capsys, flags(text, tmp_path, "--int8-gemm", method="adamw"), 2, "--int8-gemm needs a method with low-rank gradients")
    fails(
        capsys, flags(text, tmp_path / "no", "--int8-gemm", method="galore8bit"), 2, "int8_gemm must be False for GaLoreAdamW8bit"
    )


def test_bf16_weights_that_are_rounded_stochastically(text, tmp_path, capsys):
    runs = {}
    for name, more in {"on": ["--stochastic-rounding"], "off": []}.items():
        assert train(flags(text, tmp_path / name, "--dtype", "bf16", *more, method="galore", steps=4)) == 0
        runs[name] = weights(tmp_path / name)
    assert any(not torch.equal(runs["on"][name], runs["off"][name]) for name in runs["on"])
    wanted = "--stochastic-rounding needs --dtype bf16, weights are fp32"
    fails(capsys, flags(text, tmp_path / "no", "--stochastic-rounding", method="galore"), 2, wanted)


def test_every_flag_is_bound_or_free_for_a_resume():
    parser = cli.Parser()
    train_flags.add_arguments(parser)
    assert sorted(train_flags.BOUND + train_flags.FREE) == sorted(a.dest for a in parser._actions if a.dest != "help")


def test_a_missing_package_is_named(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(capsys, flags(text, tmp_path), 1, "transformers", "pip install 'lowrank-sys[train]'")


def test_two_runs_never_share_a_folder(text, tmp_path, capsys):
    with command._claim(tmp_path):
        fails(capsys, flags(text, tmp_path), 2, "another run is writing there")
