"""peft: adapters trained by our optimizers. What is frozen stays as it was, and matrices of adapters are matrices."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import lowrank_sys.integrations.transformers as integration
from lowrank_sys.optim import APOLLOAdamW, GaLoreAdamW, QGaLoreAdamW8bit, param_groups

STEPS = 4
KINDS = {
    "LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}, "with a module": {"modules_to_save": ["lm_head"]},
}  # fmt: skip


def adapted(folder, kind):
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=8, **chosen, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_groups(folder, kind):
    plain, low_rank = param_groups(adapted(folder, kind), rank=4)
    names = [name for name, _ in low_rank["params"]]
    assert len(names) == 12 and all("lora_A" in name or "lora_B" in name for name in names)
    others = {"DoRA": "lora_magnitude_vector", "with a module": "lm_head"}
    assert all(others[kind] in name for name, _ in plain["params"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "optim, cls", [("galore_adamw", GaLoreAdamW), ("apollo_adamw", APOLLOAdamW), ("q-galore", QGaLoreAdamW8bit)]
)
def test_peft_trains(folder, tmp_path, trained_by, kind, optim, cls):
    model = adapted(folder, kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = {"input_ids": torch.arange(40), "labels": torch.arange(40)}
    named = {"optim": optim, "optim_target_modules": ["lora_"], "optim_args": "rank=4,scale=1"} if "_" in optim else {}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", **named,
    )  # fmt: skip
    given = None if named else (integration.optimizer(optim), {"lr": 1e-2, "rank": 4, "scale": 1.0})
    run = Trainer(model, arguments, train_dataset=[row] * 16, optimizer_cls_and_kwargs=given)
    with trained_by(cls, STEPS):
        run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
