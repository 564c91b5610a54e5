"""transformers.Trainer with its own name for an optimizer: one import makes it this package's.

python examples/trainer_names.py
"""

import tempfile

import tiny
from transformers import Trainer, TrainingArguments

import lowrank_sys.integrations.transformers  # noqa: F401


def main(steps=20):
    data = [{"input_ids": ids, "labels": ids} for batch in tiny.batches(2 * steps) for ids in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
            optim="galore_adamw_layerwise", optim_target_modules=["attn", "mlp"], optim_args="rank=16, update_proj_gap=10",
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(tiny.model(), arguments, train_dataset=data)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
