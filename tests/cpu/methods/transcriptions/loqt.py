"""LoQT: Adam on a factor beside quantized weights, merged at gaps that grow; the factor takes up the error of quantizing."""

import torch
from transcriptions import adam, following, leading

# QLoRA, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def by_groups(rows, size, rounded):
    """Rows in pieces of `size` entries, each through `rounded`."""
    return torch.cat([rounded(piece) for piece in rows.split(size, 1)], 1)


def nf4(w):
    levels = torch.tensor(LEVELS, dtype=w.dtype)

    def rounded(piece):
        most = piece.abs().amax(1, keepdim=True)
        return levels[((piece / most)[..., None] - levels).abs().argmin(2)] * most

    return by_groups(w, 64, rounded)


def int8(w):
    def rounded(piece):
        scale = piece.abs().amax(1, keepdim=True) / 119
        return (piece / scale).round() * scale

    return by_groups(w, 256, rounded)


def int4(p):
    """Each vector (a column of p) in 16 steps from its least to its greatest entry."""
    least, most = p.amin(0), p.amax(0)
    return least + ((p - least) * 15 / (most - least)).round() * (most - least) / 15


def loqt(weight, gradients, left, *, quantize, rank, gap, growth, scale, lr, betas, eps, weight_decay, compensation):
    """The weights of every step, codes and factor together; `weight` is quantized before the first."""
    turn = (lambda x: x) if left else (lambda x: x.T)
    q, p, out, h = turn(quantize(weight)), None, [], {"betas": betas, "eps": eps}
    x, m, v = (torch.zeros(rank, q.shape[1], dtype=q.dtype) for _ in range(3))
    due, merges = 0, 0
    for t, g in enumerate(map(turn, gradients)):
        if t == due:
            old, p = p, int4(following(leading(g, rank), p))
            if old is not None:
                q, x = merged(q + old @ x, p, lambda w: turn(quantize(turn(w))), compensation)
            due += gap + (int(growth**merges) if merges else 0)
            merges += 1
        x = (1 - lr * weight_decay) * x - lr * scale * adam(m, v, p.T @ g, t + 1, h)
        out.append(turn(q + p @ x))
    return out


def merged(w, p, quantize, iterations):
    pairs, x = [], torch.zeros(p.shape[1], w.shape[1], dtype=w.dtype)
    for _ in range(iterations):
        q = quantize(w - p @ x)
        x = torch.linalg.pinv(p) @ (w - q)
        pairs.append((q, x))
    return min(pairs, key=lambda pair: torch.linalg.norm(w - pair[0] - p @ pair[1])) if pairs else (quantize(w), x)
