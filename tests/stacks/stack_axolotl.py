"""axolotl: its YAML with our plugin, by its names of optimizers and by any method of ours."""

import json

import pytest
import yaml

from lowrank_sys.optim import FiraAdamW, GaLoreAdamW, QGaLoreAdamW8bit

STEPS = 6


@pytest.mark.parametrize("keys, cls", [
    ({"optimizer": "galore_adamw", "optim_target_modules": ["mlp"], "optim_args": {"rank": 8}}, GaLoreAdamW),
    ({"optimizer": "q_galore_adamw8bit", "optim_target_modules": ["mlp"], "qgalore_rank": 8}, QGaLoreAdamW8bit),
    ({"optimizer": "adamw_torch", "lowrank": {"method": "fira", "rank": 8}}, FiraAdamW),
], ids=["galore_adamw", "q_galore_adamw8bit", "fira"])  # fmt: skip
def test_sft(folder, chats, tmp_path, trained_by, keys, cls):
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    config = {
        "base_model": str(folder), "plugins": ["lowrank_sys.integrations.axolotl.LowRank"], "sequence_len": 64,
        "datasets": [{"path": str(chats), "ds_type": "json", "type": "chat_template"}], "chat_template": "tokenizer_default",
        "val_set_size": 0, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": 1e-2,
        "lr_scheduler": "constant", "output_dir": str(tmp_path / "out"), "logging_steps": 1, "bf16": False, "fp16": False,
        "dataset_prepared_path": str(tmp_path / "data"), "save_safetensors": True, **keys,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(tmp_path / "config.yaml"))
    with trained_by(cls, STEPS):
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    log = next((tmp_path / "out").rglob("trainer_state.json"))
    losses = [row["loss"] for row in json.loads(log.read_text())["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]
