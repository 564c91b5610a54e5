"""Lightning: an optimizer like any other, in one process or several.

python examples/lightning_module.py
"""

import lightning
import tiny
import torch

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GaLoreAdamW, param_groups


class Llama(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny.model()
        project_model(self, rank=16, side="right")  # this module is what DistributedDataParallel wraps
        self.losses = []

    def training_step(self, ids, i):
        loss = tiny.loss_of(self.model, ids)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return GaLoreAdamW(param_groups(self, rank=16, update_proj_gap=10), lr=1e-2)


def main(steps=20, micro_batches=2, devices=1):
    module = Llama()
    loader = torch.utils.data.DataLoader(list(tiny.batches(steps * micro_batches)), batch_size=None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, max_epochs=1, accumulate_grad_batches=micro_batches, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
