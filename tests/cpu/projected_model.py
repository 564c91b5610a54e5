"""A small model of ProjectedLinear layers, trained."""

import pytest
import torch

from lowrank_sys.nn import ProjectedLinear, project_model
from lowrank_sys.optim import GaLoreAdamW, param_groups

RANK, GAP, LR, EPS = 8, 4, 1e-2, 1e-3


BATCH, LENGTH, VOCAB = 4, 17, 64  # 68 tokens: a size that no weight has


# Two orders of summation of the same numbers: rounding of a loss near 4, and of weights below 1 that steps of Adam, with an eps far
# above the gradients' rounding, carry on.
CLOSE = {"atol": 1e-5, "rtol": 0}


BOTH = pytest.mark.parametrize("side", ["left", "right"])


def llama(seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "use_cache": False, **config}))


def galore(model, per_layer=None, cls=GaLoreAdamW, lr=LR, **keys):
    groups = param_groups(model, rank=RANK, **{"update_proj_gap": GAP, **keys})
    return cls(groups, lr=lr, eps=EPS, weight_decay=0.1, per_layer=per_layer)


def projected(side="right", model=None, cls=GaLoreAdamW, per_layer=None, share=False, **keys):
    model = project_model(llama() if model is None else model, RANK, side, share=share)
    return model, galore(model, per_layer, cls, **keys)


def batch(step):
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step % 4))


def backward(model, step, micro=1):
    """The loss."""
    losses = [model(input_ids=ids, labels=ids).loss / micro for ids in batch(step).chunk(micro)]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses)


def train(model, optimizer, steps, micro=1, clip=None, forward=None):
    """The losses."""
    losses = []
    for step in steps:
        losses.append(backward(model if forward is None else forward, step, micro))
        if clip is not None:
            clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ProjectedLinear)}


def kept_bytes(layer, rows):
    """Bytes of distinct storages that a layer's forward keeps for backward, beside parameters and the basis."""
    own = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers(), *layer.projection.basis)}
    own |= {t.untyped_storage()._cdata for t in (layer.projection.omega,) if t is not None}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
        layer(torch.randn(2, rows // 2, layer.weight.shape[1], requires_grad=True))
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
