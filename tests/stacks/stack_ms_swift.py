"""ms-swift: every method by its table of optimizers."""

import json

import pytest

from lowrank_sys.optim import APOLLOAdamW, GaLoreAdamW, QGaLoreAdamW8bit

STEPS = 8


@pytest.mark.parametrize("keys, cls", [
    ({"optimizer": "lowrank-galore", "optim_args": "rank=8,scale=1"}, GaLoreAdamW),
    ({"optimizer": "lowrank-apollo-mini"}, APOLLOAdamW),
    ({"optimizer": "lowrank-q-galore", "optim_args": "rank=8, betas=(0.8, 0.9)"}, QGaLoreAdamW8bit),
], ids=["galore", "apollo-mini", "q-galore"])  # fmt: skip
def test_sft(folder, chats, tmp_path, trained_by, keys, cls):
    from swift import sft_main

    (tmp_path / "plugin.py").write_text("import lowrank_sys.integrations.ms_swift\n")
    flags = {
        "model": folder, "model_type": "llama", "template": "dummy", "dataset": chats, "tuner_type": "full",
        "torch_dtype": "float32", "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "output_dir": tmp_path / "out", "report_to": "none", "logging_steps": 1, "use_cpu": True,
        "lr_scheduler_type": "constant", "check_model": False, "gradient_checkpointing": False,
        "external_plugins": tmp_path / "plugin.py", **keys,
    }  # fmt: skip
    with trained_by(cls, STEPS):
        sft_main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    log = next((tmp_path / "out").rglob("trainer_state.json"))
    losses = [row["loss"] for row in json.loads(log.read_text())["log_history"] if "loss" in row]
    assert losses[-1] < losses[0], losses
