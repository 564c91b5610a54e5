"""A run rehearsed: two steps of the real model, hooks, optimizer and training loop, with every tensor counted."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_sys.memory import allocator
from lowrank_sys.memory.layout import Layout, layout
from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.optim import ledger
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.train import data, methods, models, trainer
from lowrank_sys.train.methods import settle

STEPS = 2  # the first makes the state, the second has gradients and activations beside it


class Rehearsal(NamedTuple):
    """Bytes of live tensors: `peak`, with its parts `at_peak`; `rest`, what stays when a step is over, with `at_rest`.

    in_heap: the most that was alive in blocks that glibc takes from its heap. model: as it was after the run. changes: (part,
    bytes) of all that was allocated and freed, in order. layout: what stays, piece by piece.
    """

    peak: int
    at_peak: dict[str, int]
    rest: int
    at_rest: dict[str, int]
    in_heap: int
    model: torch.nn.Module
    changes: list[tuple[str, int]]
    layout: Layout


def rehearse(args: argparse.Namespace, *, fake: bool = True) -> Rehearsal:
    """Train `args` (those of `lowrank train`, checked) for two steps as it would, evaluations included; nothing is written.

    fake: tensors hold nothing, and operators compute nothing but shapes. Otherwise the run is real, on the CPU, from tokens 0.
    Raises CommandError as `lowrank train` for what model and optimizer refuse.
    """
    args = argparse.Namespace(**{**vars(args), "steps": STEPS, "save_steps": STEPS + 1})
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as modes:
        args.out = out
        mode = None
        if fake:
            mode = modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            modes.enter_context(_as_if_real())
        live = modes.enter_context(LiveStorages(args.device == "cuda", mode))
        model = methods.project(_model(args, cpu), args)
        if fake:
            model.to = lambda *_, **__: model  # a fake weight cannot be swapped, and there is nowhere to go
        for tensor in (*model.parameters(), *model.buffers()):
            live.track(tensor, "weights")
        for param in model.parameters():
            if param.requires_grad:  # before the optimizer's own hooks, which may drop the gradient
                param.register_post_accumulate_grad_hook(lambda p: live.track(p.grad, "gradients"))
        for module in {model, model.base_model}:  # a loss without logits calls the latter
            module.register_forward_pre_hook(lambda *_: setattr(live, "phase", "activations"))
        optimizer = methods.build(model, args)
        optimizer.register_step_post_hook(_refresh_again)

        def mark():
            for category, tensor, _ in ledger.entries(optimizer):
                live.track(tensor, category)

        def backward_is_over(loss):
            live.phase = "workspace"
            mark()  # what accumulates is there now, and gone after the step

        sequences = args.batch_size * args.gradient_accumulation_steps
        stream = torch.zeros(2 * STEPS * sequences * args.seq_len, dtype=torch.uint8)
        held_out = data.Windows(stream, args.seq_len, args.seed, 0).sample(min(args.eval_tokens, args.batch_size * args.seq_len))

        def evaluate():
            if args.eval_tokens:
                trainer.mean_loss(model, held_out, args.batch_size)

        runner = trainer.LowRankTrainer(
            model,
            optimizer,
            trainer.cosine(optimizer, 0, STEPS, args.min_lr_ratio),
            data.Windows(stream, args.seq_len, args.seed, STEPS * sequences),
            trainer.arguments(args, cpu),
            lambda step, fill: None,
            backward_is_over,
        )
        evaluate()
        runner.train()
        evaluate()
        mark()
        in_heap = live.most_in_blocks(below=allocator.HEAP_BLOCK)
        return Rehearsal(
            live.peak, live.at_peak(), live.bytes, live.now(), in_heap, model, live.changes(), layout(model, optimizer)
        )


def _refresh_again(optimizer, *_):
    """Let the second step refresh warm bases, where the first one found them, and merge low-rank parts into their weights; sketches
    keep to their schedule, since their number is what they take."""
    for group in optimizer.param_groups:
        for state in (optimizer.state[param] for param in weights(group)):
            if group.get("refresh") == "now" and "countdown" in state:
                state["countdown"].zero_()
            if "merges" in state:
                state["merges"].fill_(-1)


@contextlib.contextmanager
def _as_if_real():
    """What asks tensors for their values goes as in a real run: transformers materializes attention masks where it sees fake
    tensors, and torch draws a truncated normal anew until no value lies outside, which of a fake one is never known."""
    from transformers.utils import import_utils

    with contextlib.ExitStack() as patches:
        for module, name, new in (
            (import_utils, "is_fake_tensor", lambda tensor: False),
            (torch.nn.init, "_no_grad_trunc_normal_", _drawn_twice),
        ):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, new))
        yield


@torch.no_grad()
def _drawn_twice(tensor, mean, std, a, b, generator=None):
    """A truncated normal of which one more draw put all values inside."""
    drawn = tensor.normal_(mean, std, generator=generator)
    outside = (drawn < a) | (drawn > b)
    return tensor.copy_(torch.where(outside, torch.empty_like(drawn).normal_(mean, std, generator=generator), drawn))


def _model(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    vocab = data.vocabulary(data.load_tokenizer(args.tokenizer)) if args.tokenizer and not args.from_ else None
    config = models.config(args.model, vocab=vocab, seq_len=args.seq_len)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    return models.build(config, dtype=dtype, device=device, weights=settle(args).weights, target_modules=args.target_modules)
