"""GaLore-SARA: indices drawn without replacement with weights sigma_i, one after another, by `uniform`."""

import torch
from transcriptions import adam, following, on_the_left


def race(values, exponential, rank):
    """Sampling without replacement as a race: of rates sigma_i the first `rank` to finish, in order of their index."""
    return sorted(range(len(values)), key=lambda i: exponential[i] / values[i])[:rank]


@on_the_left
def sara(weight, gradients, *, exponentials, rank, gap, scale, lr, betas, eps, weight_decay, carried=True):
    """exponentials: of every refresh, a vector of draws of Exp(1)."""
    w, p, out, h = weight.clone(), None, [], {"betas": betas, "eps": eps}
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    for t, g in enumerate(gradients):
        if t % gap == 0:
            u, s, _ = torch.linalg.svd(g, full_matrices=False)
            old, p = p, following(u, None)[:, sorted(race(s.tolist(), exponentials[t // gap].tolist(), rank))]
            if old is not None and carried:
                m = p.T @ (old @ m)
        w = (1 - lr * weight_decay) * w - lr * scale * p @ adam(m, v, p.T @ g, t + 1, h)
        out.append(w)
    return out
