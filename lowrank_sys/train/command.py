"""`lowrank train`: the order of things."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_sys.cli import CommandError, say
from lowrank_sys.train import agent, flags, launcher
from lowrank_sys.train.flags import BOUND, FREE, NEWER, check, flag
from lowrank_sys.train.methods import settle

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `lowrank train`; imports nothing heavy."""
    flags.add_arguments(parser)
    parser.add_argument(
        "--nproc",
        metavar="N",
        type=int,
        help="processes on this machine that train together, each with a GPU of its own where there is one, and with --batch-size "
        "sequences a micro-batch; when one dies, all start again from the last checkpoint (default: 1)",
    )


def _elements(optimizer, low_rank: bool = False) -> int:
    """How many weights are trained; low_rank: by the method's own step."""
    from lowrank_sys.optim.coefficient import weights

    groups = [group for group in optimizer.param_groups if "rank" in group or not low_rank]
    return sum(param.numel() for group in groups for param in weights(group))


def _share(optimizer) -> str:
    """Which share of what is trained has the method's own step, in words."""
    total, low_rank = _elements(optimizer), _elements(optimizer, low_rank=True)
    return f"weights: {total:,} trained, {low_rank / total:.0%} of them by the method's own step"


def run(args: argparse.Namespace) -> int:
    """Train; returns 0. Raises CommandError: code 2 for bad input, 1 for a failure while writing, 130 if interrupted."""
    args.place = launcher.Place()
    try:
        args.place = check(args)
        _several(args) if args.nproc is not None and args.nproc != 1 and args.place.size == 1 else _train(args)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; pip install 'lowrank-sys[train]' brings it", code=1) from error
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; --resume goes on from the last checkpoint in {args.out}", code=130) from None
    except CommandError as error:
        if args.place.local_rank > 0:  # the first process of each machine says it
            raise SystemExit(error.code) from None
        raise
    return 0


def _several(args: argparse.Namespace) -> None:
    """Train in --nproc processes of this machine."""
    if args.nproc < 1:
        raise CommandError(f"--nproc: got {args.nproc}; it must be at least 1")
    if args.per_layer == "in_backward":
        raise CommandError(f"--per-layer in_backward runs in one process, got --nproc {args.nproc}; use --per-layer accumulate")
    if _device(args.device).type == "cuda":
        import torch

        if args.nproc > torch.cuda.device_count():
            raise CommandError(f"--nproc: got {args.nproc}; it must be at most {torch.cuda.device_count()}, the GPUs that are here")
    _expect_no_run(args)
    agent.start(args.nproc, flags.words(args), Path(args.out), args.resume)


def _train(args: argparse.Namespace) -> None:
    import transformers

    from lowrank_sys import backends
    from lowrank_sys.distributed import World
    from lowrank_sys.memory import allocator
    from lowrank_sys.nn.unused import skips_experts
    from lowrank_sys.train import checkpoint, data, methods, models, report, trainer
    from lowrank_sys.train.packing import IGNORED, Packed
    from lowrank_sys.train.record import Recorder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place, world = args.place, World()
    tell = say if place.first else lambda line: None
    args = settle(args, tell)
    out, device = Path(args.out), _device(args.device)
    for name in args.report_to or ():
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"--report-to {name}: {name} is not installed; pip install {name} brings it", code=1)
    if slow := backends.slow(device.type):
        tell(slow)
    args.dtype = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(args.dtype, args.dtype)
    if args.stochastic_rounding and args.dtype == "fp32":
        raise CommandError("--stochastic-rounding needs --dtype bf16, weights are fp32")
    if place.size > 1 and args.per_layer == "in_backward":
        raise CommandError(f"--per-layer in_backward runs in one process, got {place.size}; use --per-layer accumulate")
    if place.size > 1 and args.weights != "float" and args.per_layer is None:
        args.per_layer = "accumulate"  # what several processes can average of a quantized weight

    def load():
        return data.load(
            args.data, seq_len=args.seq_len, tokenizer=args.tokenizer, field=args.text_field, chats=args.from_ is not None,
            valid=args.valid_data,
        )  # fmt: skip

    with contextlib.ExitStack() as held:
        # what the first process finds out alone, and does before there is a group that a rehearsal would speak to
        found, error = launcher.attempt(lambda: _prepare(args, load(), device, held)) if place.first else (None, None)
        place.join(device.type)
        corpus, found = (found[0], found[1:]) if found else (None, None)
        identity, start, rows, chosen, origin = place.told(found, error)
        corpus = corpus or load()
        try:
            world.expect_same({**identity, "data_sha256": corpus.digest()})
        except RuntimeError as different:
            raise CommandError(str(different)) from None
        args = argparse.Namespace(**{**vars(args), **chosen})
        identity |= {"chosen": chosen, "per_layer": args.per_layer}

        transformers.set_seed(args.seed)
        sequences = args.batch_size * args.gradient_accumulation_steps * place.size
        # the steps so far may have been those of another number of processes, and have read more or fewer windows
        done = origin.get("step", 0)
        shift = origin.get("windows", done * sequences) - done * sequences
        read = shift + args.steps * sequences
        windows = functools.partial(Packed, pack=not args.no_packing) if args.from_ else data.Windows
        train, valid = (windows(stream, args.seq_len, args.seed, read) for stream in (corpus.train, corpus.valid))
        model = _model(args, device, corpus.vocab)
        if args.from_:
            _expect_apart(model, train, valid, args)
        model = methods.project(model, args)
        if device.type == "cpu" and allocator.should_save(args, model, allocator.available_bytes()):
            allocator.save_memory()
        optimizer = methods.build(model, args)
        tell(_share(optimizer))
        aside = sum(p.numel() for p in models.not_of_text(model))
        if aside:
            tell(f"weights: {aside:,} of what text does not pass through stay as they are")
        if args.from_:
            _tell_of_documents(train, valid, args, tell)
        held_out, seen = (side.sample(args.eval_tokens) for side in (valid, train))

        def loss_on(sample):
            return trainer.mean_loss(model, sample, args.batch_size) if args.eval_tokens else None

        warmup = round(args.warmup_ratio * args.steps) if args.warmup_steps is None else args.warmup_steps
        recorder = Recorder(
            out / "metrics.jsonl",
            rows=rows,
            steps=args.steps,
            eval_steps=args.eval_steps,
            tokens_per_step=sequences * train.tokens,
            evaluate=lambda: loss_on(held_out),
            skipped=optimizer.skipped,
            memory=functools.partial(report.peak_memory_bytes, device),
            world=world,
            writes=place.first,
            report=(lambda row: runner.report(row)) if args.report_to else None,
        )

        def save(step, fill):
            recorder.flush(sync=True)  # a checkpoint's rows are on the disk before it is
            made = {"windows": shift + step * sequences, **report.surroundings(place.size)}
            checkpoint.write(out, step, identity, fill, args.keep, **made)

        runner = trainer.LowRankTrainer(
            model,
            optimizer,
            trainer.cosine(optimizer, warmup, args.steps, args.min_lr_ratio),
            trainer.Later(train, shift),
            trainer.arguments(args, device, args.report_to or (), experts=skips_experts(model)),
            save,
            recorder.seen,
        )
        runner.add_callback(recorder)
        before = report.fingerprints(optimizer)
        try:
            runner.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            recorder.close()
        if not place.first:
            return
        training_peak = report.peak_memory_bytes(device)

        predicted, vocabulary = held_out["labels"][:, 1:], model.config.get_text_config().vocab_size
        summary = {
            "method": args.method,
            "model": args.model,
            "steps": args.steps,
            "processes": place.size,
            "batch_size_of_a_process": args.batch_size,
            "tokens": round(read * train.tokens),
            "val_loss": recorder.rows[-1]["val_loss"] or loss_on(held_out),
            "train_loss": loss_on(seen),
            "unigram_entropy": data.unigram_entropy(train.ids, predicted[predicted != IGNORED], vocabulary),
            "tokens_per_second": report.speed(recorder.rows),
            "optimizer_state_bytes": optimizer.state_bytes(),
            "adamw_state_bytes": 2 * 4 * _elements(optimizer),
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

    options = {"dtype": _dtype(args.dtype), "device": device, "weights": args.weights, "target_modules": args.target_modules}
    if args.from_ is None:
        return models.build(models.config(args.model, vocab=vocab if args.tokenizer else None, seq_len=args.seq_len), **options)
    model = models.load(args.from_, **options)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and args.seq_len > most:
        raise CommandError(f"--seq-len {args.seq_len}: {args.from_} knows positions up to {most}")
    if vocab > model.get_input_embeddings().num_embeddings:
        raise CommandError(f"--tokenizer {args.tokenizer}: it has {vocab:,} tokens, more than {args.from_} has embeddings")
    return model


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _tell_of_documents(windows, valid, args: argparse.Namespace, tell) -> None:
    for side in (windows, valid):
        if not side.windows:
            source = args.valid_data if side is valid and args.valid_data else args.data
            raise CommandError(f"--data {source}: nothing is learned of the first --seq-len {args.seq_len} tokens of any document")
    flaws = [f"{windows.cut:,} documents are cut at --seq-len {args.seq_len}"] if windows.cut else []
    flaws += [f"{windows.left_out:,} are left out, as nothing of them is learned"] if windows.left_out else []
    tell("; ".join([f"windows: {len(windows.windows):,}, {windows.learned:,} tokens are learned", *flaws]))


def _expect_apart(model, train, valid, args: argparse.Namespace) -> None:
    from lowrank_sys.train.packing import mixes

    border = train.border() or valid.border()
    if border and mixes(model, border):
        raise CommandError(
            f"--from {args.from_}: {type(model).__name__} of transformers lets the documents of a window see each other; "
            "--no-packing gives each a window of its own"
        )


def _prepare(args: argparse.Namespace, corpus, device: torch.device, held: contextlib.ExitStack) -> tuple:
    """The corpus, the identity of the run, where it starts (`_start`), with the flags that it takes by itself, and the manifest of
    the checkpoint that it goes on from. The folder is held by `held`."""
    from lowrank_sys.memory import fit

    say(
        f"data: {args.data}, {corpus.documents:,} documents; {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.valid):,} for validation, split by {corpus.split}"
    )
    identity = {name: getattr(args, name) for name in BOUND} | {"data_sha256": corpus.digest()}
    held.enter_context(_claim(Path(args.out)))
    start, rows, chosen, origin = _start(args, Path(args.out), identity)
    if chosen is None:
        memory = fit.device_memory(device) // (1 if device.type == "cuda" else args.place.local_size)
        chosen = fit.choose(argparse.Namespace(**{**vars(args), "device": device.type}), memory, say)
    return corpus, identity, start, rows, chosen, origin


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


def _expect_no_run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    held = any((out / name).exists() for name in ("metrics.jsonl", "summary.json", "final")) or any(out.glob("step-*"))
    if held and not args.resume:
        raise CommandError(f"--out {out}: it holds a run already; choose another --out, or --resume to go on with it")


def _start(
    args: argparse.Namespace, out: Path, identity: dict[str, Any]
) -> tuple[Path | None, list[dict[str, Any]], dict[str, Any] | None, dict[str, Any]]:
    """The checkpoint to go on from, None to start anew; the rows of metrics.jsonl up to it; the flags that the run took by
    itself, None if that is still to be decided; and its manifest."""
    from lowrank_sys.train import checkpoint, report
    from lowrank_sys.train.record import read_rows

    _expect_no_run(args)
    if not args.resume:
        return None, [], None, {}
    checkpoint.sweep(out)
    found = checkpoint.newest(out, tell=say)
    if found is None:
        say(f"no checkpoint in {out} yet: starting at step 0")
        return None, [], None, {}
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
    changes = [
        f"{name} {manifest[name]} there, {value} here"
        for name, value in report.surroundings(args.place.size).items()
        if manifest.get(name, value) != value
    ]
    if changes:
        say(f"warning: {'; '.join(changes)}: it goes on, but not to the bit")
    return folder, rows, chosen, {name: manifest[name] for name in ("step", "windows") if name in manifest}
