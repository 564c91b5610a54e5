"""Lightning with manual optimization: backward, clipping and steps are the module's own.

python examples/lightning_manual.py
"""

import lightning
import tiny
import torch

from lowrank_sys.optim import GaLoreAdamW, param_groups


class Llama(lightning.LightningModule):
    def __init__(self, micro_batches):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.micro_batches, self.losses = tiny.model(), micro_batches, []

    def training_step(self, ids, i):
        optimizer = self.optimizers()
        loss = tiny.loss_of(self.model, ids)
        self.manual_backward(loss / self.micro_batches)
        if (i + 1) % self.micro_batches == 0:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return GaLoreAdamW(param_groups(self.model, rank=16, update_proj_gap=10), lr=1e-2)


def main(steps=20, micro_batches=2):
    module = Llama(micro_batches)
    loader = torch.utils.data.DataLoader(list(tiny.batches(steps * micro_batches)), batch_size=None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
