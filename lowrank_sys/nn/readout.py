"""How a language model makes logits of what its output head returns: found by asking the model's own forward."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Above what any cap lets through, and still finite in fp32 whatever the scale.
HUGE = 1e30


class Readout(NamedTuple):
    """logits = scale * z, or cap * tanh(scale * z / cap), with z = h Wᵀ + b of the output head."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        z = z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


@torch.no_grad()
def readout(model: PreTrainedModel) -> Readout | None:
    """What the causal language model `model` does between its last hidden states and its loss.

    None where that is anything but a Readout of one nn.Linear, and the cross-entropy of the next token: another head, a
    scale by token, a loss for the balance of experts. Found by running the model's forward with its decoder and its head
    replaced for the moment by ones that return numbers which are known, so neither weights nor their device are touched, and
    the model may be on fake tensors. Takes a few milliseconds.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    vocabulary = head.out_features
    with _disable_current_modes():
        z = torch.linspace(-20, 20, vocabulary, dtype=torch.float64, device="cpu").repeat(1, 2, 1)
        z[0, 1, 0], z[0, 1, -1] = HUGE, 1.0  # the last token predicts nothing
        hidden = torch.arange(2.0 * head.in_features, device="cpu").remainder(7).view(1, 2, -1)
        ids = torch.zeros(1, 2, dtype=torch.int64, device="cpu")
        try:
            with _returning(model, head, hidden, z) as seen:
                out = model.forward(input_ids=ids, labels=ids)
            logits = out.logits.double()
            found = _fitted(logits[0, 1, 0].item(), logits[0, 1, -1].item())
            want = found(z)
            same = (
                len(seen) == 1
                and torch.equal(seen[0].float(), hidden)
                and torch.allclose(logits, want, rtol=1e-6)
                and math.isclose(out.loss.item(), cross_entropy(want[0, :1], ids[0, 1:]).item(), rel_tol=1e-4)
            )
        except Exception:  # whatever else it does there: its own loss is right
            return None
    return found if same else None


def _fitted(huge: float, one: float) -> Readout:
    """The readout with these values at HUGE and 1."""
    if huge > math.sqrt(HUGE):
        return Readout(one)
    return Readout(float(f"{huge * math.atanh(one / huge):.7g}"), huge)


@contextlib.contextmanager
def _returning(model, head, hidden, z):
    """Decoder and head return `hidden` and `z`; yields a list of what the head was given."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """Whatever else a family reads from its decoder is None."""

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)

    seen = []
    forwards = {head: lambda x: seen.append(x) or z}
    for decoder in {model.base_model, model.get_decoder()}:
        forwards[decoder] = lambda *_, **__: Output(last_hidden_state=hidden)
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield seen
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
