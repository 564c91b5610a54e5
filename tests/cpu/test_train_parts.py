"""Models, clipping, the schedule, metrics rows and the AdamW baseline of `lowrank train`."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_sys import cli
from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import QGaLoreAdamW8bit
from lowrank_sys.train import models, report, trainer
from lowrank_sys.train.record import read_rows

MILLIONS = {
    "llama-1m": 0.984,
    "llama-9m": 9.75,
    "llama-60m": 58.1,
    "llama-130m": 134.1,
    "llama-350m": 368.0,
    "llama-1b": 1339.0,
    "llama-7b": 6738.4,
    "llama-13b": 13015.9,
    "llama3-8b": 8030.3,
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_preset_sizes(name):
    model = models.build(models.config(name), dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)


def test_model_in_bf16_keeps_its_rotary_frequencies_in_fp32():
    config = models.config("llama-1m", vocab=300, seq_len=4096)
    model = models.build(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in model.named_buffers() if "inv_freq" in n} == {torch.float32}
    assert config.vocab_size == 300 and config.max_position_embeddings == 4096


def leaves(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p) * 3
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_clipping_finite_gradients_is_torchs(max_norm, dtype):
    ours, theirs = leaves((5, 7), (11,), dtype=dtype), leaves((5, 7), (11,), dtype=dtype)
    norm = trainer.clip_gradients(iter(ours), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm.to(expected.dtype), expected)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clipping_does_not_spread_a_bad_element(bad):
    first, second = leaves((5, 7), (11,))
    first.grad[2, 3] = bad
    before, expected = first.grad.clone(), second.grad / second.grad.norm()
    norm = trainer.clip_gradients([first, second], 1.0)
    assert norm == pytest.approx(second.grad.norm().item() * norm.item(), rel=1e-4)
    torch.testing.assert_close(second.grad, expected)
    wrong = ~first.grad.isfinite()
    assert wrong.sum() == 1 and wrong[2, 3]
    torch.testing.assert_close(first.grad[~wrong], before[~wrong] / norm)


def test_clipping_sees_norms_beyond_fp32():
    (p,) = leaves((4, 4))
    p.grad.fill_(1e25)
    assert trainer.clip_gradients([p], 1.0).item() == pytest.approx(4e25)
    assert p.grad.norm().item() == pytest.approx(1.0)


def test_cosine():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 2.0}])
    schedule = trainer.cosine(optimizer, warmup=4, steps=24, floor=0.1)
    rates = []
    for _ in range(25):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[14] == pytest.approx(2 * 0.55) and rates[24] == pytest.approx(0.2)


def test_rows_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(8)) + '{"step": 8, "lo')
    assert [row["step"] for row in read_rows(path, 5)] == [0, 1, 2, 3, 4, 5]
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (0, 1, 3)))
    with pytest.raises(ValueError, match="do not run from step 0 to 3"):
        read_rows(path, 3)


def test_the_flags_import_nothing_heavy():
    code = (
        "import argparse, sys; from lowrank_sys.train import flags; flags.add_arguments(argparse.ArgumentParser()); "
        "print([m for m in ('transformers', 'datasets', 'accelerate', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def matrices(*shapes, dtype, int8=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=False, dtype=dtype) for m, n in shapes))
    model = quantize_model(model, group_size=32) if int8 else model
    return model, QGaLoreAdamW8bit([{"params": list(model.parameters()), "rank": 2}])


@pytest.mark.parametrize("dtype, int8", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str)
def test_a_fingerprint_tells_every_byte(dtype, int8, monkeypatch):
    monkeypatch.setattr(report, "PIECE", 16)  # words
    model, optimizer = matrices((40, 33), (5, 3), (16, 8), dtype=dtype, int8=int8)
    before = report.fingerprints(optimizer)
    assert before == report.fingerprints(optimizer) and len(set(before)) == 3
    for i, layer in enumerate(model):
        stored = (layer.codes if int8 else layer.weight.detach()).view(-1).view(torch.uint8)
        for at in {0, 7, 128, len(stored) // 2, len(stored) - 1} & set(range(len(stored))):
            stored[at] ^= 1
            assert [a != b for a, b in zip(before, report.fingerprints(optimizer))] == [j == i for j in range(3)]
            stored[at] ^= 1
    first = model[0].codes if int8 else model[0].weight.detach()
    first[[0, 1]] = first[[1, 0]].clone()  # in another order
    assert report.fingerprints(optimizer)[0] != before[0]


class Copies(TorchDispatchMode):
    """Counts the INT8 weights that are made, and copies of their codes; remembers the largest tensor that was made."""

    made = copied = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in given]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in new)])
        if func.name().startswith("lowrank::quantize_int8"):
            self.made += 1
        elif any(t.dtype == torch.int8 and t.dim() == 2 and not t.is_meta for t in new):
            self.copied += 1
        return out


def test_int8_weights_are_made_once_and_never_copied(tmp_path):
    text = tmp_path / "text.py"
    text.write_bytes(Path(argparse.__file__).read_bytes())
    with Copies() as copies:
        code = cli.main(
            [
                "train",
                "--model",
                "llama-1m",
                "--method",
                "q-galore",
                "--rank",
                "8",
                "--steps",
                "2",
                "--batch-size",
                "1",
                "--seq-len",
                "16",
                "--eval-tokens",
                "16",
                "--device",
                "cpu",
                "--as-given",
                "--data",
                str(text),
                "--out",
                str(tmp_path / "run"),
            ]
        )
    assert code == 0
    assert copies.made == 14  # linear layers
    assert copies.copied == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["matrices_changed"] == [14, 14]


def test_a_fingerprint_copies_pieces_only():
    _, optimizer = matrices((2048, 4096), dtype=torch.float32)
    with Copies() as copies:
        report.fingerprints(optimizer)
    assert 0 < copies.largest <= 8 * report.PIECE < 2048 * 4096
