"""The loss of a causal language model without its logits: head and cross-entropy, chunk by chunk."""

import functools
import math
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

from lowrank_sys.nn.readout import Readout, readout

TOKENS, VOCABULARY = 1024, 4096
REDUCTIONS = ("mean", "sum")

PLAIN = Readout()


def _in_full_precision(method):
    """Products inside keep their types under autocast."""

    @functools.wraps(method)
    def run(ctx, tensor, *rest):
        with torch.autocast(tensor.device.type, enabled=False):
            return method(ctx, tensor, *rest)

    return run


class _CrossEntropy(torch.autograd.Function):
    """Sum over tokens t of log Σ_v exp(z_tv) - z_t,y(t) with z = f(h Wᵀ + b), f a Readout.

    Forward keeps log Σ_v exp(z_tv); backward makes each chunk of z again: dz = softmax(z) - onehot(y). The gradient of the sum
    and the scale of f come after the products: dz alone lies in [-1, 1], and stays in the range of fp16.
    """

    @staticmethod
    @_in_full_precision
    def forward(ctx, hidden, weight, bias, labels, ignore_index, tokens, vocabulary, shape=PLAIN):
        kept = labels != ignore_index
        wide, operand = _types(hidden, weight)
        log_sum = hidden.new_full(labels.shape, -torch.inf, dtype=wide)
        picked = hidden.new_full(labels.shape, torch.nan, dtype=wide)
        for first in range(0, weight.shape[0], vocabulary):
            head = weight[first : first + vocabulary].to(operand)
            for at in range(0, hidden.shape[0], tokens):
                rows = slice(at, at + tokens)
                z = _logits(hidden[rows].to(operand), head, bias, first, wide, shape)
                log_sum[rows] = torch.logaddexp(log_sum[rows], z.logsumexp(1))
                inside, column = _in_chunk(labels[rows], kept[rows], first, head.shape[0])
                picked[rows] = torch.where(inside, z.gather(1, column[:, None])[:, 0], picked[rows])
                del z
        ctx.save_for_backward(hidden, weight, bias, labels, log_sum)
        ctx.options = ignore_index, tokens, vocabulary, shape
        return torch.where(kept, log_sum - picked, 0.0).sum()

    @staticmethod
    @once_differentiable
    @_in_full_precision
    def backward(ctx, grad_out):
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
        ignore_index, tokens, vocabulary, shape = ctx.options
        kept = labels != ignore_index
        wide, operand = _types(hidden, weight)
        grad_out = grad_out * shape.scale
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if need_bias else None
        for first in range(0, weight.shape[0], vocabulary):
            head = weight[first : first + vocabulary].to(operand)
            d_head = torch.zeros_like(head, dtype=wide) if need_weight else None
            d_shift = head.new_zeros(head.shape[0], dtype=wide) if need_bias else None
            for at in range(0, hidden.shape[0], tokens):
                rows = slice(at, at + tokens)
                states = hidden[rows].to(operand)
                z = _logits(states, head, bias, first, wide, shape)
                dz = z.sub_(log_sum[rows, None]).exp_() if shape.cap is None else (z - log_sum[rows, None]).exp_()
                inside, column = _in_chunk(labels[rows], kept[rows], first, head.shape[0])
                dz.scatter_add_(1, column[:, None], -inside.to(dz.dtype)[:, None])
                # a skipped token may have a logit that is not finite
                dz.masked_fill_(~kept[rows, None], 0)
                if shape.cap is not None:  # tanh' = 1 - tanh²
                    dz.addcmul_(dz, z.div_(shape.cap).square_(), value=-1)
                del z
                if need_bias:
                    d_shift += dz.sum(0)
                dz = dz.to(operand)
                if need_hidden:
                    _add_product_(d_hidden[rows], dz, head)
                if need_weight:
                    _add_product_(d_head, dz.T, states)
                del dz
            chunk = slice(first, first + head.shape[0])
            if need_weight:
                d_weight[chunk] = d_head.mul_(grad_out)
            if need_bias:
                d_bias[chunk] = d_shift.mul_(grad_out)
        d_hidden = d_hidden.mul_(grad_out).to(hidden.dtype) if need_hidden else None
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _types(hidden, weight):
    """(type of sums, type of the operands): on a GPU the tensor cores take 16-bit ones as they are."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    as_they_are = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2
    return wide, hidden.dtype if as_they_are else wide


def _product(a, b, wide):
    """a @ b with sums and result in `wide`."""
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _add_product_(out, a, b):
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(_product(a, b, out.dtype))


def _logits(hidden, head, bias, first, wide, shape):
    z = _product(hidden, head.T, wide)
    if bias is not None:
        z.add_(bias[first : first + head.shape[0]])
    if shape.cap is not None:
        return z.mul_(shape.scale / shape.cap).tanh_().mul_(shape.cap)
    return z if shape.scale == 1 else z.mul_(shape.scale)


def _in_chunk(labels, kept, first, size):
    """Which labels are in the chunk of the vocabulary, and their column in it (0 for the others)."""
    inside = kept & (labels >= first) & (labels < first + size)
    return inside, torch.where(inside, labels - first, 0)


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
) -> torch.Tensor:
    """cross_entropy(f(hidden @ weight.T + bias), labels) in fp32, without its logits; f(z) = scale z, or cap tanh(scale z / cap).

    Only `tokens` x `vocabulary` logits and `vocabulary` rows of the weight in fp32 exist at once, in backward as well, where
    the logits are made again. Products and sums are fp32 (fp64 for fp64), whatever the storage; the gradients are rounded to
    it once. On a GPU, states and a weight of one 16-bit type are multiplied as they are, which is as exact; for its two
    products the gradient of the logits is rounded to that type, which costs about what rounding the result does. Logits, sums
    and softmax stay fp32. Differentiable once.

    Args:
        hidden: (..., d) last hidden states, fp32 | bf16 | fp16.
        weight: (V, d) of the output head, bias: (V) or None.
        scale: factor on the logits, as Cohere's and Granite's; not 0.
        cap: soft bound of the logits after it, as Gemma's; above 0, or None.
        labels: (...) int64 of the tokens to predict, already shifted; `ignore_index` ones do not count. One outside of the
            vocabulary makes the loss NaN.
        reduction: 'mean' over the tokens that count (NaN if none does), or 'sum'.
        tokens, vocabulary: sizes of the chunks.

    Returns:
        0-dim fp32 (fp64 for fp64).
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    for name, size in (("tokens", tokens), ("vocabulary", vocabulary)):
        if not size >= 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if not (cap is None or 0 < cap < math.inf):
        raise ValueError(f"cap must be above 0 and finite, or None, got {cap}")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"hidden must have shape (..., d) and weight (V, d), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape {tuple(hidden.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    flat = labels.reshape(-1)
    states, shape = hidden.reshape(-1, hidden.shape[-1]), Readout(scale, cap)
    total = _CrossEntropy.apply(states, weight, bias, flat, ignore_index, tokens, vocabulary, shape)
    return total if reduction == "sum" else total / (flat != ignore_index).sum()


def causal_lm_loss(model, input_ids, labels, *, num_items_in_batch=None, tokens=TOKENS, vocabulary=VOCABULARY, **inputs):
    """The loss that the Hugging Face causal language model `model` returns for `labels`, by chunked_loss.

    input_ids, labels: (batch, sequence) int64; token t predicts label t + 1, labels of -100 do not count.
    num_items_in_batch: what the sum is divided by; None: the number of tokens that count. inputs: for the model's decoder,
    such as attention_mask.

    A model whose loss is not the cross-entropy of a linear head, scaled or capped (lowrank_sys.nn.readout), computes it itself,
    with its logits.
    """
    shape = readout(model)
    if shape is None:
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return model(input_ids=input_ids, labels=labels, **items, **inputs).loss
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=input_ids, **inputs).last_hidden_state
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = chunked_loss(
        hidden, head.weight, shifted, head.bias, **shape._asdict(), reduction=reduction, tokens=tokens, vocabulary=vocabulary
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch
