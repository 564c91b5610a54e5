"""Flora: momentum in a random projection, carried to the next one, over Adafactor's factored root, clipped by its RMS."""

import torch
from transcriptions import on_the_left


@on_the_left
def flora(weight, gradients, *, bases, gap, scale, lr, beta1, weight_decay, compressed=False):
    """bases: (d, r), one after another. compressed: whether the optimizer is handed back(project(G)), as after accumulation."""
    w, out, b = weight.clone(), [], bases[0]
    momentum = torch.zeros(b.shape[1], weight.shape[1], dtype=weight.dtype)
    row, col = torch.zeros(len(weight), dtype=weight.dtype), torch.zeros(weight.shape[1], dtype=weight.dtype)
    for t, g in enumerate(gradients):
        if t > 0 and t % gap == 0:
            momentum, b = bases[t // gap].T @ (b @ momentum), bases[t // gap]
        momentum = beta1 * momentum + (1 - beta1) * b.T @ g
        square, beta2 = (b @ b.T @ g if compressed else g) ** 2 + 1e-30, 1 - (t + 1) ** -0.8
        row, col = beta2 * row + (1 - beta2) * square.mean(1), beta2 * col + (1 - beta2) * square.mean(0)
        update = b @ momentum / (row[:, None] * col / row.mean()).sqrt()
        update = update / (update.square().mean().sqrt()).clamp(min=1.0)
        w = (1 - lr * weight_decay) * w - lr * scale * update
        out.append(w)
    return out
