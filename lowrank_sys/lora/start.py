"""Where LoRA begins, from the full gradient: LoRA-One's singular space, GoRA's ranks and its gradient seen through A."""

from collections.abc import Mapping

import torch
from torch import nn

from lowrank_sys.lora.gram import grams
from lowrank_sys.lora.pairs import pairs
from lowrank_sys.nn.linear_layers import linear_layers

# Of svd_lowrank: as many directions as LoRA-One's authors look at for rank 8 and more, and steps for a slow spectrum.
OVERSAMPLED, ITERATIONS = 64, 16


@torch.no_grad()
def lora_one_(model: nn.Module, gradients: Mapping[str, torch.Tensor], *, gamma: float = 128.0, adapter: str | None = None) -> None:
    """Begin every pair in the singular space of the full gradient: one step along its r largest directions, of normed size.

    LoRA-One (Zhang et al. 2025, arXiv:2502.01235), as its code: with U S Vᵀ of -G, B = U_r sqrt(S_r / (gamma S_1)) and
    A = sqrt(S_r / (gamma S_1)) V_rᵀ, so that scale B A is scale / gamma times the best part of rank r
    of -G / S_1. The base weight stays.

    Args:
        model: with pairs of factors, such as a model of peft.
        gradients: of `full_gradients`, one for each pair.
        gamma: the authors' 128, with rsLoRA's scale alpha / sqrt(r).
    """
    for pair, g in _with_gradients(model, gradients, adapter):
        r, least = pair.A.shape[0], min(g.shape)
        u, s, v = torch.svd_lowrank(-g, q=min(least, max(4 * r, OVERSAMPLED)), niter=ITERATIONS)
        root = (s[:r] / (gamma * s[0])).sqrt()
        pair.B.copy_(u[:, :r] * root)
        pair.A.copy_(root[:, None] * v[:, :r].T)


@torch.no_grad()
def gora_ranks(
    model: nn.Module, gradients: Mapping[str, torch.Tensor], rank: int = 8, *, least: int | None = None, most: int | None = None
) -> dict[str, int]:
    """{name of a layer: its rank}, the larger the more its weight matters: peft's LoraConfig takes it as `rank_pattern`.

    GoRA (He et al. 2025, arXiv:2502.12171): importance is mean |W o G|, and a layer's share of it is its share of the budget
    sum rank sqrt(m + n), of which a rank of W (m, n) costs sqrt(m + n).

    Args:
        model: before peft, with the weights that `gradients` (of `full_gradients`) are of.
        rank: r that the budget is for.
        least, most: bounds; rank / 2 and 4 rank by default, as the authors' 4 and 32 for 8.
    """
    least, most = rank // 2 if least is None else least, 4 * rank if most is None else most
    if not 1 <= least <= most:
        raise ValueError(f"least and most must be whole numbers with 1 <= least <= most, got {least} and {most}")
    layers = dict(linear_layers(model))
    if unknown := sorted(gradients.keys() - layers.keys()):
        raise ValueError(f"gradients must be of linear layers of the model, got one for {unknown[0]}")
    matter, cost = {}, {}
    for name, g in gradients.items():
        weight = layers[name].weight
        w = weight.T if type(layers[name]).__name__ == "Conv1D" else weight
        matter[name] = float((w.float().to(g.device) * g).abs().mean())
        cost[name] = sum(g.shape) ** 0.5
    whole, budget = sum(matter.values()), rank * sum(cost.values())
    if not 0 < whole < float("inf"):
        raise ValueError(f"gradients must be finite and not all 0, got importance {whole}")
    return {name: min(max(round(budget * matter[name] / whole / cost[name]), least), most) for name in gradients}


@torch.no_grad()
def gora_(model: nn.Module, gradients: Mapping[str, torch.Tensor], *, step: float = 5e-2, adapter: str | None = None) -> None:
    """Begin every pair with the gradient as its A sees it, one step down: A stays as it was drawn, and

        B = - step sqrt(n / r) G Aᵀ (A Aᵀ)⁻¹ / scale,    so that scale B A = - step sqrt(n / r) G A⁺ A.

    GoRA (He et al. 2025, arXiv:2502.12171). A random A of r rows sees sqrt(r / n) of G's norm, which the root makes up for. step is
    that of the authors' scripts. Arguments as of `lora_one_`.
    """
    for pair, g in _with_gradients(model, gradients, adapter):
        a = pair.A.to(g.device, g.dtype)
        (gram,) = grams([a])
        r, n = a.shape
        pair.B.copy_(g @ a.T @ gram.inverse() * (-step * (n / r) ** 0.5 / pair.scale))


def _with_gradients(model, gradients, adapter):
    """[(pair, its gradient in fp32)]; ValueError before anything is written."""
    found = [(pair, gradients.get(pair.name)) for pair in pairs(model, adapter)]
    for pair, g in found:
        want = (pair.B.shape[0], pair.A.shape[1])
        if g is None or tuple(g.shape) != want:
            raise ValueError(f"gradients must have {pair.name} of shape {want}, got {None if g is None else tuple(g.shape)}")
        if not 0 < float(g.abs().max()) < float("inf"):
            raise ValueError(f"the gradient of {pair.name} must be finite and not all 0, got {float(g.abs().max())} as its largest")
    return [(pair, g.float()) for pair, g in found]
