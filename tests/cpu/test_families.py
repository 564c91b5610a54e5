"""Every family, from its config.json and from a saved folder: planned as it runs, trained, and loaded by plain transformers."""

import json
import math

import pytest
import torch
from families import FAMILIES, config
from lanes import usual
from rehearsed import assert_rests_as_planned
from test_chats import tokenizer
from test_planner import arguments
from transformers import AutoConfig

from lowrank_sys import cli
from lowrank_sys.memory import rehearsal
from lowrank_sys.nn.skeleton import auto_class, language_part
from lowrank_sys.train import trainer

SIZES = {"batch_size": 2, "seq_len": 32, "plain_lr": 1e-2, "eval_tokens": 64}
# A rank, and a rate at which two steps without warm-up descend: at 1e-2 one step of APOLLO-Mini is nearly as long as the weights.
METHODS = {"galore": (4, 1e-2), "q-galore": (4, 1e-2), "apollo-mini": (1, 1e-3)}
WAYS = ("--model", "--from")
QUICK = [("mixtral", "q-galore", "--from"), ("gemma3", "q-galore", "--model")]
REST = [case for family in FAMILIES for method in METHODS for way in WAYS if (case := (family, method, way)) not in QUICK]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    return str(folder)


def source(folder, family, way):
    """Its config.json; or a folder with random weights and a tokenizer."""
    made = config(family)
    made.save_pretrained(folder)
    if way == "--model":
        return str(folder / "config.json")
    torch.manual_seed(0)
    auto_class(made).from_config(made).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family, method, way", usual(QUICK, *REST))
def test_a_family_is_trained_as_planned(tmp_path, capsys, monkeypatch, text, family, method, way):
    kept, save = [], trainer.save_final
    monkeypatch.setattr(trainer, "save_final", lambda model, *rest, **more: kept.append(model) or save(model, *rest, **more))
    at, out = source(tmp_path / "model", family, way), tmp_path / "run"
    rank, lr = METHODS[method]
    changes = {**SIZES, "method": method, "rank": rank, "lr": lr}
    words = [word for name, value in changes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [way, at, "--data", text, "--device", "cpu", "--dtype", "fp32", "--steps", "2", "--eval-steps", "1"]
    code = cli.main(["train", *words, "--merge-dtype", "fp32", "--out", str(out)])
    said = capsys.readouterr().err
    assert code == 0, said
    first, *rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [first["val_loss"], *(row["val_loss"] for row in rows)]
    assert all(map(math.isfinite, [*losses, *(row["loss"] for row in rows)])) and losses[0] != losses[1] and losses[2] < losses[0]
    summary = json.loads((out / "summary.json").read_text())
    changed, matrices = summary["matrices_changed"]
    assert matrices / 2 < changed <= matrices  # an expert may be without tokens
    assert ("weights: stay float" in said) == (method == "q-galore" and summary["arguments"]["weights"] == "float")

    (model,) = kept
    settings = AutoConfig.from_pretrained(out / "final")
    loaded = auto_class(settings).from_pretrained(out / "final").eval()
    ids = torch.arange(40).view(2, 20) + 3
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    of_text = {id(p) for module in language_part(model) for p in module._parameters.values()}
    assert all(p.requires_grad == (id(p) in of_text) for p in model.parameters())

    args = arguments(**changes, model=at, from_=at if way == "--from" else None)
    fake, real = rehearsal.rehearse(args), rehearsal.rehearse(args, fake=False)
    assert fake.peak == pytest.approx(real.peak, rel=0.05)
    assert_rests_as_planned(fake, real, rel=0.005)
    assert fake.at_peak["weights"] == real.at_peak["weights"]


@pytest.mark.parametrize("family, method", usual([], ("mixtral", "galore"), ("qwen3_moe", "q-galore"), ("llava", "galore")))
def test_a_run_that_was_cut_goes_on_with_all_its_weights(tmp_path, text, family, method):
    """Experts too, which transformers writes one by one."""
    at = source(tmp_path, family, "--model")
    words = ["--model", at, "--method", method, "--rank", "4", "--batch-size", "2", "--seq-len", "16", "--data", text, "--device",
             "cpu", "--dtype", "fp32", "--steps", "2", "--save-steps", "1", "--eval-tokens", "0", "--lr", "1e-2"]  # fmt: skip
    finals = []
    for name in ("whole", "cut"):
        out = tmp_path / name
        assert cli.main(["train", *words, "--out", str(out)]) == 0
        if name == "cut":
            (out / "summary.json").unlink()
            for path in (*(out / "final").iterdir(), *(out / "step-00000002").iterdir()):
                path.unlink()
            (out / "final").rmdir()
            (out / "step-00000002").rmdir()
            assert cli.main(["train", *words, "--out", str(out), "--resume"]) == 0
        finals.append((out / "final" / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]


def test_what_is_no_language_model_is_refused_in_a_line(tmp_path, capsys):
    AutoConfig.for_model("siglip_vision_model").save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path / "config.json"), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("has no vocab_size: it is no language model by itself") == 1
