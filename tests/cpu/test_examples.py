"""The programs under examples/ run as they are, and learn."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
LIGHTNING = ("lightning_module", "lightning_manual")


@pytest.fixture
def example(monkeypatch):
    """Import an example by its name, as `python examples/NAME.py` would find its neighbours."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("tiny", None)


def test_every_example_is_here():
    several = {"ddp", "fsdp2", "finetune_smollm"}  # run by tests/cpu/distributed and test_finetune_smollm.py
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "tiny", "custom_loop", "lora_pro", *LIGHTNING, *several, *LEARN,
    }  # fmt: skip


def test_custom_loop(example):
    assert example("custom_loop").main() < 0.1


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning(example, name):
    pytest.importorskip("lightning", reason="lightning is not installed")
    losses = example(name).main()
    assert losses[-1] < 0.9 * losses[0]


def test_lora_pro(example):
    pytest.importorskip("peft", reason="peft is not installed")
    losses = example("lora_pro").main()
    assert losses[-1] < 0.97 * losses[0]


LEARN = ("accelerate_loop", "accumulate_and_clip", "int8_in_backward", "trainer", "trainer_names")


@pytest.mark.parametrize("name", LEARN)
def test_it_learns(example, name):
    losses = example(name).main()
    assert losses[-1] < 0.9 * losses[0]
