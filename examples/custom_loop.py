"""GaLore by hand: the op in a training loop of your own, on one matrix.

python examples/custom_loop.py
"""

import torch

import lowrank_sys  # noqa: F401  registers torch.ops.lowrank


def main(steps=100, rank=8):
    torch.manual_seed(0)
    target = torch.randn(256, rank) @ torch.randn(rank, 192)
    W, B = torch.zeros(256, 192), None
    m, v = torch.zeros(rank, 192), torch.zeros(rank, 192)  # moments of R = BᵀG, (r, n)
    for step in range(1, steps + 1):
        G = W - target
        if step % 20 == 1:  # warm-started from the second time on
            B, _ = torch.ops.lowrank.subspace_iteration(G, B, rank=rank, left=True)
        torch.ops.lowrank.galore_step(
            W, G, B, m, v, step=step, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0, left=True
        )
        if step % 20 == 0:
            print(f"step {step}: loss {(W - target).square().mean():.4f}")
    return (W - target).square().mean().item()


if __name__ == "__main__":
    main()
