"""transformers.Trainer with a low-rank optimizer: two lines differ from any other script.

python examples/trainer.py
"""

import tempfile

import tiny
from transformers import Trainer, TrainingArguments

from lowrank_sys.optim import APOLLOAdamW, param_groups


def main(steps=20):
    model = tiny.model()
    data = [{"input_ids": ids, "labels": ids} for batch in tiny.batches(steps) for ids in batch]
    optimizer = APOLLOAdamW(param_groups(model, rank=16, update_proj_gap=10), lr=1e-2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    main()
