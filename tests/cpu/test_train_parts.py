"""Models, clipping, the schedule, metrics rows and the AdamW baseline of `lowrank train`."""

import json
import math
import subprocess
import sys

import pytest
import torch

from lowrank_sys.train import models, trainer
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
        "import argparse, sys; from lowrank_sys.train import command; command.add_arguments(argparse.ArgumentParser()); "
        "print([m for m in ('transformers', 'datasets', 'accelerate', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
