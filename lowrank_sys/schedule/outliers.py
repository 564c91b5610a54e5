"""How much of a layer stands out, for OwLore's draws (OWL, Yin et al. 2024, arXiv:2310.05175)."""

import torch

from lowrank_sys.schedule.roles import layer_of

# An entry of |X| |W| stands out above this many times the mean of its layer (OWL, section 3).
FACTOR = 13.0


@torch.no_grad()
def outlier_scores(model, batches, factor=FACTOR):
    """{layer: the share of the entries |X_j| |W_ij| of its linear weights above `factor` times their mean in it}.

    |X_j|: the norm of input j over all tokens of `batches`, of which each is called as model(batch), or model(**batch) of a dict.
    Layers as lowrank_sys.schedule.roles.layer_of names them. A layer without any outlier gets 0, and is never drawn.
    """
    squares, handles = {}, []
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and _numbered(name)}

    def add(name):
        def hook(module, inputs):
            x = inputs[0].detach().flatten(0, -2).float()
            squares[name] = squares.get(name, 0) + x.square().sum(0)

        return hook

    try:
        handles += [module.register_forward_pre_hook(add(name)) for name, module in linear.items()]
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not squares:
        raise ValueError("model must have numbered layers with nn.Linear in them that the batches reach, got none")
    layers = {}
    for name, total in squares.items():
        layers.setdefault(layer_of(f"{name}.weight"), []).append(linear[name].weight.float().abs() * total.sqrt())
    return {layer: _share_above(products, factor) for layer, products in layers.items()}


def _numbered(name):
    return any(part.isdigit() for part in name.split("."))


def _share_above(products, factor):
    count = sum(product.numel() for product in products)
    mean = sum(product.double().sum() for product in products) / count
    return float(sum((product > factor * mean).sum() for product in products)) / count
