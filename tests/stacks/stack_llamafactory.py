"""LLaMA-Factory: v0 by its own use_galore and use_apollo, v1 by its registry of optimizers."""

import importlib.machinery
import json
import sys
import types

import pytest

from lowrank_sys.optim import APOLLOAdamW, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit

STEPS = 6


@pytest.fixture
def shims(monkeypatch):
    """In place before LLaMA-Factory is imported; so is torchaudio, which it imports for sounds, and whose wheel wants CUDA."""
    from lowrank_sys.integrations import shims

    audio = types.ModuleType("torchaudio")
    audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio", audio)
    shims.install()
    yield
    shims.uninstall()


@pytest.mark.parametrize("keys, cls", [
    ({"use_galore": True, "galore_rank": 8, "optim": "adamw_torch"}, GaLoreAdamW),
    ({"use_galore": True, "galore_rank": 8, "optim": "adamw_8bit"}, GaLoreAdamW8bit),
    ({"use_apollo": True, "apollo_rank": 4, "optim": "adamw_torch"}, APOLLOAdamW),
], ids=["galore", "galore 8-bit", "apollo"])  # fmt: skip
def test_v0_by_its_yaml(shims, folder, chats, tmp_path, trained_by, keys, cls):
    from llamafactory.train.tuner import run_exp

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {"file_name": str(chats), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"chats": described}))
    with trained_by(cls, STEPS):
        run_exp({
            "stage": "sft", "do_train": True, "model_name_or_path": str(folder), "finetuning_type": "full", "template": "default",
            "dataset": "chats", "dataset_dir": str(tmp_path), "cutoff_len": 64, "max_steps": STEPS, "use_cpu": True,
            "per_device_train_batch_size": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path / "out"), "report_to": "none",
            "logging_steps": 1, "lr_scheduler_type": "constant", **keys,
        })  # fmt: skip
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0]


@pytest.mark.parametrize("method, cls", [("galore", GaLoreAdamW), ("q-galore", QGaLoreAdamW8bit), ("fira", FiraAdamW)])
def test_v1_by_its_registry(folder, chats, tmp_path, trained_by, method, cls):
    from llamafactory.v1.trainers.sft_trainer import run_sft

    import lowrank_sys.integrations.llamafactory  # noqa: F401

    rows = [json.loads(row)["messages"] for row in chats.read_text().splitlines()]
    speakers = {"user": "human", "assistant": "gpt"}
    talks = [{"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in row]} for row in rows]
    (tmp_path / "data.json").write_text(json.dumps(talks))
    (tmp_path / "data.yaml").write_text(f"chats: {{path: {tmp_path / 'data.json'}, source: local, converter: sharegpt}}\n")
    with trained_by(cls, STEPS):
        run_sft({
            "model": str(folder), "train_dataset": str(tmp_path / "data.yaml"), "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS, "cutoff_len": 128, "batching_workers": 0, "bf16": False,
            "optim_config": {"name": f"lowrank-{method}", "lr": 1e-2, "rank": 8},
        })  # fmt: skip
    assert any((tmp_path / "out").glob("*.safetensors"))
