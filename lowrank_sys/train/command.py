"""`lowrank train`: the order of things."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_sys.cli import CommandError, say
from lowrank_sys.train.flags import BOUND, FREE, NEWER, check, flag
from lowrank_sys.train.flags import add_arguments as add_arguments
from lowrank_sys.train.methods import settle

if TYPE_CHECKING:
    import torch


def _share(optimizer) -> str:
    """Which share of what is trained has the method's own step, in words."""
    from lowrank_sys.optim.coefficient import weights

    elements = [(sum(p.numel() for p in weights(group)), "rank" in group) for group in optimizer.param_groups]
    total, low_rank = sum(count for count, _ in elements), sum(count for count, low in elements if low)
    return f"weights: {total:,} trained, {low_rank / total:.0%} of them by the method's own step"


def run(args: argparse.Namespace) -> int:
    """Train; returns 0. Raises CommandError: code 2 for bad input, 1 for a failure while writing, 130 if interrupted."""
    try:
        check(args)
        _train(args)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; pip install 'lowrank-sys[train]' brings it", code=1) from error
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; --resume goes on from the last checkpoint in {args.out}", code=130) from None
    return 0


def _train(args: argparse.Namespace) -> None:
    import transformers

    from lowrank_sys.memory import allocator, fit
    from lowrank_sys.train import checkpoint, data, methods, report, trainer
    from lowrank_sys.train.packing import IGNORED, Packed
    from lowrank_sys.train.record import Recorder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = settle(args, say)
    out, device = Path(args.out), _device(args.device)
    args.dtype = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(args.dtype, args.dtype)
    if args.stochastic_rounding and args.dtype == "fp32":
        raise CommandError("--stochastic-rounding needs --dtype bf16, weights are fp32")

    corpus = data.load(
        args.data, seq_len=args.seq_len, tokenizer=args.tokenizer, field=args.text_field, chats=args.from_ is not None,
        valid=args.valid_data,
    )  # fmt: skip
    say(
        f"data: {args.data}, {corpus.documents:,} documents; {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.valid):,} for validation, split by {corpus.split}"
    )
    identity = {name: getattr(args, name) for name in BOUND} | {"data_sha256": corpus.digest()}
    with _claim(out):
        start, rows, chosen = _start(args, out, identity)
        if chosen is None:
            chosen = fit.choose(argparse.Namespace(**{**vars(args), "device": device.type}), fit.device_memory(device), say)
        args = argparse.Namespace(**{**vars(args), **chosen})
        identity |= {"chosen": chosen, "per_layer": args.per_layer}

        transformers.set_seed(args.seed)
        model = _model(args, device, corpus.vocab)
        if device.type == "cpu" and allocator.should_save(args, model, allocator.available_bytes()):
            allocator.save_memory()
        optimizer = methods.build(model, args)
        say(_share(optimizer))
        sequences = args.batch_size * args.gradient_accumulation_steps
        windows = functools.partial(Packed, pack=not args.no_packing) if args.from_ else data.Windows
        train, valid = (windows(stream, args.seq_len, args.seed, args.steps * sequences) for stream in (corpus.train, corpus.valid))
        if args.from_:
            _tell_of_documents(train, valid, args)
        held_out = valid.sample(args.eval_tokens)
        warmup = round(args.warmup_ratio * args.steps) if args.warmup_steps is None else args.warmup_steps
        recorder = Recorder(
            out / "metrics.jsonl",
            rows=rows,
            steps=args.steps,
            eval_steps=args.eval_steps,
            tokens_per_step=sequences * train.tokens,
            evaluate=lambda: trainer.mean_loss(model, held_out, args.batch_size),
            skipped=optimizer.skipped,
        )

        def save(step, fill):
            recorder.flush(sync=True)  # a checkpoint's rows are on the disk before it is
            checkpoint.write(out, step, identity, fill, args.keep)

        runner = trainer.LowRankTrainer(
            model,
            optimizer,
            trainer.cosine(optimizer, warmup, args.steps, args.min_lr_ratio),
            train,
            trainer.arguments(args, device),
            save,
            recorder.seen,
        )
        runner.add_callback(recorder)
        before = report.fingerprints(optimizer)
        try:
            runner.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            recorder.close()
        training_peak = report.peak_memory_bytes(device)

        seen, predicted = train.sample(args.eval_tokens), held_out["labels"][:, 1:]
        summary = {
            "method": args.method,
            "model": args.model,
            "steps": args.steps,
            "tokens": round(args.steps * sequences * train.tokens),
            "val_loss": recorder.rows[-1]["val_loss"] or trainer.mean_loss(model, held_out, args.batch_size),
            "train_loss": trainer.mean_loss(model, seen, args.batch_size),
            "unigram_entropy": data.unigram_entropy(train.ids, predicted[predicted != IGNORED], model.config.vocab_size),
            "tokens_per_second": report.speed(recorder.rows),
            "optimizer_state_bytes": optimizer.state_bytes(),
            "adamw_state_bytes": 2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory": optimizer.memory(),
            "training_peak_memory_bytes": training_peak,
            "peak_memory_bytes": report.peak_memory_bytes(device),
            "skipped": recorder.rows[-1]["skipped"],
            "matrices_changed": before and [sum(a != b for a, b in zip(before, report.fingerprints(optimizer))), len(before)],
            "seed": args.seed,
            "machine": report.machine(device),
            "command": shlex.join(["lowrank", *sys.argv[1:]]),
            "arguments": {name: getattr(args, name) for name in (*BOUND, *FREE)},
        }
        # what it writes may change the model
        trainer.save_final(model, out / "final", args.tokenizer, merged=_dtype(args.merge_dtype))
        report.write_summary(out, summary)
        title = f"{args.model}, {args.method}, {args.data}"
        try:
            report.plot(out / "loss.png", recorder.rows, summary["unigram_entropy"], title)
        except Exception as error:  # fonts, settings and versions of matplotlib: the run is whole without its picture
            say(f"warning: loss.png could not be drawn: {' '.join(str(error).split())}")
        print(report.table(summary))
        print(f"  files             {out}")


def _model(args: argparse.Namespace, device: torch.device, vocab: int) -> torch.nn.Module:
    """The model that trains. vocab: of the tokenizer, if there is one."""
    from lowrank_sys.train import models

    options = {"dtype": _dtype(args.dtype), "device": device, "int8": args.weights == "int8", "target_modules": args.target_modules}
    if args.from_ is None:
        return models.build(models.config(args.model, vocab=vocab if args.tokenizer else None, seq_len=args.seq_len), **options)
    model = models.load(args.from_, **options)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and args.seq_len > most:
        raise CommandError(f"--seq-len {args.seq_len}: {args.from_} knows positions up to {most}")
    if vocab > model.get_input_embeddings().num_embeddings:
        raise CommandError(f"--tokenizer {args.tokenizer}: it has {vocab:,} tokens, more than {args.from_} has embeddings")
    return model


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _tell_of_documents(windows, valid, args: argparse.Namespace) -> None:
    for side in (windows, valid):
        if not side.windows:
            source = args.valid_data if side is valid and args.valid_data else args.data
            raise CommandError(f"--data {source}: nothing is learned of the first --seq-len {args.seq_len} tokens of any document")
    flaws = [f"{windows.cut:,} documents are cut at --seq-len {args.seq_len}"] if windows.cut else []
    flaws += [f"{windows.left_out:,} are left out, as nothing of them is learned"] if windows.left_out else []
    say("; ".join([f"windows: {len(windows.windows):,}, {windows.learned:,} tokens are learned", *flaws]))


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no GPU here; valid here: auto, cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


@contextlib.contextmanager
def _claim(out: Path):
    """Make the folder and hold it, so that two runs never write into it at once."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:
        raise CommandError(f"--out {out}: cannot write there: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CommandError(f"--out {out}: another run is writing there") from None
        yield


def _start(
    args: argparse.Namespace, out: Path, identity: dict[str, Any]
) -> tuple[Path | None, list[dict[str, Any]], dict[str, Any] | None]:
    """The checkpoint to go on from, None to start anew; the rows of metrics.jsonl up to it; and the flags that the run took by
    itself, None if that is still to be decided."""
    from lowrank_sys.train import checkpoint
    from lowrank_sys.train.record import read_rows

    if not args.resume:
        if any((out / name).exists() for name in ("metrics.jsonl", "summary.json", "final")) or any(out.glob("step-*")):
            raise CommandError(f"--out {out}: it holds a run already; choose another --out, or --resume to go on with it")
        return None, [], None
    checkpoint.sweep(out)
    found = checkpoint.newest(out, tell=say)
    if found is None:
        say(f"no checkpoint in {out} yet: starting at step 0")
        return None, [], None
    folder, manifest = found
    there = manifest["identity"]
    chosen = {} if args.as_given else {name: value for name, value in there.get("chosen", {}).items() if not getattr(args, name)}
    changed = [
        f"{flag(name)} {there.get(name, NEWER.get(name))} there, {value} here"
        for name, value in identity.items()
        if name != "data_sha256" and there.get(name, NEWER.get(name)) != chosen.get(name, value)
    ]
    if changed:
        raise CommandError(f"--resume: {folder} is of another run: {'; '.join(changed)}")
    if there["data_sha256"] != identity["data_sha256"]:
        raise CommandError(f"--resume: {folder} is of another run: the text behind --data {args.data} has changed since")
    if manifest["step"] > args.steps:
        raise CommandError(f"--steps {args.steps}: {folder} is already past that; it must be at least {manifest['step']}")
    try:
        rows = read_rows(out / "metrics.jsonl", manifest["step"])
    except (OSError, ValueError) as error:
        raise CommandError(f"--resume: {out / 'metrics.jsonl'}: {error}", code=1) from error
    say(f"resuming at step {manifest['step']} from {folder}")
    return folder, rows, chosen
