"""A LoRA adapter of peft with LoRA-Pro's gradients, begun by LoRA-One in the singular space of the full gradient.

pip install peft; python examples/lora_pro.py
"""

import peft
import tiny
import torch

from lowrank_sys import lora


def main(steps=40):
    model = tiny.model()
    config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    gradients = lora.full_gradients(adapted, tiny.batches(8, seed=1), tiny.loss_of)
    lora.lora_one_(adapted, gradients)

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    lora.adjust_gradients(optimizer, adapted, "lora-pro")
    losses = []
    for step, ids in enumerate(tiny.batches(steps)):
        loss = tiny.loss_of(adapted, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
