"""transformers.Trainer with our data order, our clipping, our checkpoints and our own losses."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lowrank_sys.cli import CommandError
from lowrank_sys.distributed import World
from lowrank_sys.nn import causal_lm_loss
from lowrank_sys.nn.pretrained import save_quantized
from lowrank_sys.nn.quantize import dequantize_model, is_marked
from lowrank_sys.nn.readout import readout
from lowrank_sys.optim.clip import gradient_norms, scale_to_norm_
from lowrank_sys.train import checkpoint
from lowrank_sys.train.data import load_tokenizer
from lowrank_sys.train.models import use_cache
from lowrank_sys.train.packing import IGNORED, stacked

if TYPE_CHECKING:
    import argparse

    from lowrank_sys.train.data import Windows
    from lowrank_sys.train.packing import Packed

# Newer releases of transformers have another name for it, and warn of the old one.
CHECKPOINTING = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"


class LowRankTrainer(Trainer):
    """Trains `model` on `windows` in their order.

    save: called with the step and a function that fills a folder with everything a resume needs.
    seen: called with the loss of every micro-batch, a 0-dim tensor on the device, already divided by their number.
    Raises CommandError for gradient checkpointing of a model that cannot.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        windows: Windows | Packed | Later,
        arguments: TrainingArguments,
        save: Callable[[int, Callable[[Path], None]], None],
        seen: Callable[[torch.Tensor], None],
    ):
        if getattr(arguments, CHECKPOINTING) and not getattr(model, "supports_gradient_checkpointing", True):
            raise CommandError(f"--gradient-checkpointing: {type(model).__name__} of transformers does not support it")
        super().__init__(model, arguments, train_dataset=windows, data_collator=collate, optimizers=(optimizer, schedule))
        # where every window has the same number of targets, the plain mean over micro-batches is the token mean
        self.model_accepts_loss_kwargs = not windows.even
        self.remove_callback(PrinterCallback)
        self._write_checkpoint = save
        self._seen = seen

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = clip_gradients

    def report(self, row: dict[str, Any]) -> None:
        """Hand a row of metrics.jsonl to the integrations of `report_to`."""
        state = copy.copy(self.state)
        state.global_step = row["step"]
        logs = {"eval_loss" if name == "val_loss" else name: value for name, value in row.items() if value is not None}
        self.callback_handler.on_log(self.args, state, self.control, logs)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # Windows is in its final order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not is_marked(self.model.config):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        with _loss_for_forward(self.model):  # who quantizes weights has no room for logits
            loss = model(**inputs, **items)
        return loss * self.accelerator.num_processes if items else loss  # the processes' losses are averaged

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._seen(loss)
        return loss

    def _save_checkpoint(self, model, trial):
        random = self._random_states()

        def fill(folder: Path) -> None:
            self.model.save_pretrained(folder, save_original_format=False)  # as the model that goes on from it names its tensors
            self._save_optimizer_and_scheduler(str(folder))
            for name, content in random.items():
                (folder / name).write_bytes(content)
            self.state.save_to_json(str(folder / "trainer_state.json"))

        if self.args.process_index == 0:
            self._write_checkpoint(self.state.global_step, fill)

    def _issue_warnings_after_load(self, load_result):
        """Trainer warns of weights that a checkpoint lacks, and would go on with fresh ones."""
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        there = {id(weight) for name, weight in weights.items() if name not in load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if name not in weights or id(weights[name]) not in there]
        if lost or load_result.unexpected_keys:
            name = (lost or load_result.unexpected_keys)[0]
            raise CommandError(f"--resume: the checkpoint is of another model, it {'lacks' if lost else 'has'} {name}", code=1)

    def _random_states(self) -> dict[str, bytes]:
        """{file: its content} of the random generators of all processes, on all of them."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        world = World()
        return own if world.size == 1 else {name: text for one in world.gather(own) for name, text in one.items()}


@contextlib.contextmanager
def _loss_for_forward(model: torch.nn.Module):
    """The next forward of `model`, which may be that of a DistributedDataParallel around it, is causal_lm_loss."""

    def loss(**inputs):
        del model.forward
        return causal_lm_loss(model, **inputs)

    model.forward = loss
    try:
        yield
    finally:
        vars(model).pop("forward", None)


class Later(torch.utils.data.Dataset):
    """`windows` from the `shift`-th on. even: whether every window has the same number of targets."""

    def __init__(self, windows: Windows | Packed, shift: int):
        self.windows, self.shift, self.even = windows, shift, windows.even

    def __len__(self) -> int:
        return len(self.windows) - self.shift

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.windows[index + self.shift]


def arguments(
    args: argparse.Namespace, device: torch.device, report_to: Iterable[str] = (), *, experts: bool = False
) -> TrainingArguments:
    """TrainingArguments for `args`: what Trainer would print, report or write by itself is off. report_to: integrations that
    LowRankTrainer.report reaches. experts: whether some parameters may have no gradient in a step."""
    made = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        **{CHECKPOINTING: args.gradient_checkpointing},
        max_grad_norm=0.0 if args.per_layer == "in_backward" else args.grad_clip,
        seed=args.seed,
        save_strategy="steps",
        save_steps=args.save_steps,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=experts,
    )
    made._n_gpu = min(1, made.n_gpu)  # with several GPUs Trainer would wrap the model in DataParallel
    return made


def collate(batch: list[torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """(batch_size, seq_len) each. Windows that are token ids alone are their own labels: the model shifts them."""
    if isinstance(batch[0], dict):
        return stacked(batch)
    ids = torch.stack(batch)
    return {"input_ids": ids, "labels": ids}


def cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int, floor: float):
    """Linear warmup over `warmup` steps, then a half cosine that ends at `floor` times the rate after `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, norm_type: float = 2) -> torch.Tensor:
    """Scale the gradients so that their common norm is at most `max_norm`; returns the norm before, 0-dim.

    A gradient that is not finite does not count and does not spread: torch's own clipping would multiply every
    gradient by a NaN, and the optimizer could no longer tell the bad elements from the good ones.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    return scale_to_norm_(grads, gradient_norms(grads), max_norm)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, windows: dict[str, torch.Tensor], batch_size: int) -> float:
    """Mean cross-entropy in nats over every label of `windows` but the first of each and those of -100.

    windows: input_ids, labels, and what else the model's decoder takes, (count, seq_len) int64 each.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for at in range(0, len(windows["labels"]), batch_size):
        inputs = {name: values[at : at + batch_size].to(device) for name, values in windows.items()}
        if is_marked(model.config) and readout(model):
            total += causal_lm_loss(model, **inputs, num_items_in_batch=1)
        else:
            labels = inputs.pop("labels")[:, 1:].flatten()
            logits = model(**inputs).logits[:, :-1].float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    model.train(training)
    return (total / (windows["labels"][:, 1:] != IGNORED).sum().to(device)).item()


def save_final(model: torch.nn.Module, folder: Path, tokenizer: str | None, merged: torch.dtype | None = None) -> None:
    """Write weights and configuration, and the tokenizer if there is one, as `from_pretrained` reads them.

    Quantized weights are written as such: `lowrank_sys.nn.quantized_from_pretrained` reads them. merged: the type of an ordinary
    checkpoint in their place, which the model is made for in place; of float weights, the type that they are written in.
    """
    if merged is not None:
        (dequantize_model(model) if is_marked(model.config) else model).to(merged)
    use_cache(model.config, True)

    def fill(partial: Path) -> None:
        save_quantized(model, partial) if is_marked(model.config) else model.save_pretrained(partial)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(partial)

    checkpoint.publish(folder, fill, what="final weights")
