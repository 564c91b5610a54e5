"""adjust_gradients: a rule for pairs of factors in front of every step of an optimizer."""

from typing import Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowrank_sys.lora.gram import grams
from lowrank_sys.lora.pairs import pairs
from lowrank_sys.lora.rules import RULES


def adjust_gradients(
    optimizer: torch.optim.Optimizer, model: nn.Module, rule: Literal["lora-pro", "riemannian"] = "lora-pro", *,
    damping: float | None = None, adapter: str | None = None,
) -> RemovableHandle:  # fmt: skip
    """Before every step, replace the gradients of each pair A, B of the model by those of a rule; returns a handle to remove() it.

    Gradients are those that the optimizer would read: clipped if they were clipped, and without GradScaler's scale.
    Solves are in fp32 at least, those of all pairs of one rank together; on a GPU they wait for it. Other parameters, and a pair
    with one factor frozen, keep their gradients. A step with a closure is an error, which would make the gradients anew.

    Args:
        optimizer: any of torch's interface, which trains the pairs. Its state is that of the factors, where LoRA-Pro's authors keep
            Adam's moments of the full matrix.
        model: with LoRA adapters of peft, or factored layers.
        rule: see `lora_pro` and `riemannian`.
        damping: added to BᵀB and A Aᵀ where they are inverted; the rule's own if None.
        adapter: of peft; all by default.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if damping is not None and not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping!r}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = [pair for pair in pairs(model, adapter) if id(pair.A) in trained and id(pair.B) in trained]
    if not chosen:
        raise ValueError(f"optimizer trains no pair of the model, got {type(optimizer).__name__}")
    options = {} if damping is None else {"damping": damping}

    def adjust(_, args, kwargs):  # args with the optimizer itself
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise ValueError("closure must be None: it would replace the gradients that were adjusted")
        _adjust(chosen, RULES[rule], options)

    return optimizer.register_step_pre_hook(adjust)


@torch.no_grad()
def _adjust(chosen, rule, options):
    by_rank = {}
    for pair in chosen:
        if pair.A.grad is not None and pair.B.grad is not None:
            by_rank.setdefault((pair.A.shape[0], pair.A.device), []).append(pair)
    for same in by_rank.values():
        wide = torch.float64 if all(pair.A.dtype == torch.float64 for pair in same) else torch.float32
        factors = [(pair.A.to(wide), pair.B.to(wide)) for pair in same]
        solved = zip(grams([b.T for _, b in factors]), grams([a for a, _ in factors]))
        for pair, (a, b), gram in zip(same, factors, solved):
            adjusted = rule(a, b, pair.A.grad.to(wide), pair.B.grad.to(wide), scale=pair.scale, solved=gram, **options)
            for param, grad in zip((pair.A, pair.B), adjusted):
                param.grad.copy_(grad)
