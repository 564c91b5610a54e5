"""`lowrank bench projected`: what layers of low-rank gradients save: gradients, activations, the peak of a step, and time."""

import functools
import gc

import torch

from lowrank_sys.bench import machine, projected_times, report, shapes
from lowrank_sys.cli import CommandError
from lowrank_sys.memory.live import LiveStorages
from lowrank_sys.nn import causal_lm_loss, compare_sides, project_model
from lowrank_sys.nn.linear_layers import linear_layers
from lowrank_sys.optim import GaLoreAdamW, param_groups
from lowrank_sys.train import models

SEQUENCE = 256
SETTLED = 5  # steps after which the first bases have come from gradients


def _adamw(model, rank, tokens):
    return torch.optim.AdamW(model.parameters())


def _galore(model, rank, tokens, per_layer=None):
    return GaLoreAdamW(param_groups(model, rank), per_layer=per_layer)


def _projected(model, rank, tokens, side, share=False):
    return GaLoreAdamW(param_groups(project_model(model, rank, side, tokens=tokens, share=share), rank))


VARIANTS = {
    "adamw": _adamw,
    "galore": _galore,
    "galore, accumulate": functools.partial(_galore, per_layer="accumulate"),
    **{f"projected, {side}": functools.partial(_projected, side=side) for side in ("left", "right", "auto")},
    "projected, right, shared": functools.partial(_projected, side="right", share=True),
}


def add_arguments(parser):
    parser.add_argument("--model", default="llama-60m", help="as --model of lowrank train (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="of all low-rank variants (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=2048, help=f"in a step, in sequences of up to {SEQUENCE} (default: %(default)s)"
    )
    parser.add_argument("--times", action="store_true", help="time X B, backward and step of the linear layers instead")
    parser.add_argument("--blocks", type=shapes.positive, help="with --times: of the model, from the first (default: all)")
    parser.add_argument("--rounds", type=shapes.positive, default=10, help="with --times: interleaved (default: %(default)s)")
    report.add_output_arguments(parser)


def run(args):
    if not models.is_known(args.model):
        raise CommandError(f"--model {args.model}: must be one of {', '.join(models.PRESETS)} or a config.json")
    if args.tokens < SEQUENCE or args.tokens % SEQUENCE:
        raise CommandError(f"--tokens must be a multiple of {SEQUENCE}, got {args.tokens}")
    out = report.Report(args, machine.describe("cpu"))
    out.say(machine.line(out.facts))
    try:
        rows = projected_times.rows(args) if args.times else [_row(name, make, args) for name, make in VARIANTS.items()]
    except ValueError as error:
        raise CommandError(f"--rank {args.rank}: {error}") from None
    what = f"{args.model}, r = {args.rank}, {args.tokens} tokens a step, fp32"
    if args.times:
        out.table(f"{what}: {rows[0]['layers']} linear layers, steps without a refresh", projected_times.COLUMNS, rows)
    else:
        out.show(f"{what}: bytes of a layer by the side of its basis", SIDES, _kinds(args))
        out.table(f"{what}: bytes of its linear layers, and of a step", COLUMNS, rows)
    out.write()
    return 0


COLUMNS = [
    ("variant", lambda row: row["variant"]),
    ("of a weight's size, made in backward", lambda row: report.number(row["dense_in_backward"], "{}")),
    ("gradients", lambda row: report.size(row["gradient_bytes"])),
    ("kept for backward", lambda row: report.size(row["kept_bytes"])),
    ("while first bases are due", lambda row: report.size(row["kept_at_first_bytes"])),
    ("state", lambda row: report.size(row["state_bytes"])),
    ("peak of a step beside weights and state", lambda row: report.size(row["step_peak_bytes"])),
]


class _Backward(LiveStorages):
    """Also counts the tensors of a weight's shape that are made while `counting`."""

    def __init__(self, weights):
        super().__init__()
        self._shapes = {tuple(sorted(weight.shape)) for weight in weights}
        self.counting, self.dense = False, 0

    def track(self, tensor, category=None):
        super().track(tensor, category)
        self.dense += self.counting and tuple(sorted(tensor.shape)) in self._shapes


def _cost(side):
    return lambda row: " + ".join(report.size(part) for part in getattr(row[0], side))


# Of (Sides of one of them, how many).
SIDES = [
    ("layers", lambda row: f"{row[1]} {row[0].name.rpartition('.')[2]}"),
    ("weight", lambda row: "{} x {}".format(*row[0].shape)),
    ("left: R and moments + basis + kept", _cost("left")),
    ("right", _cost("right")),
    ("auto", lambda row: row[0].cheaper),
]


def _kinds(args):
    """(Sides of one, how many) of the layers of a name and a shape."""
    kinds = {}
    for one in compare_sides(_model(args), args.rank, tokens=args.tokens):
        kinds.setdefault((one.name.rpartition(".")[2], one.shape), []).append(one)
    return [(same[0], len(same)) for same in kinds.values()]


def _model(args):
    return models.build(models.config(args.model), dtype=torch.float32, device=torch.device("cpu"))


def _row(name, make, args):
    gc.collect()  # a model and its optimizer hold each other
    torch.manual_seed(0)
    model = _model(args)
    chosen = [layer for _, layer in linear_layers(model)]
    optimizer = make(model, args.rank, args.tokens)
    draw = torch.Generator().manual_seed(0)

    def loss(tokens):
        ids = torch.randint(model.config.vocab_size, (max(1, tokens // SEQUENCE), min(tokens, SEQUENCE)), generator=draw)
        return causal_lm_loss(model, ids, ids)

    kept_at_first = kept_bytes(chosen, lambda: loss(args.tokens))
    for _ in range(SETTLED):
        loss(16).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = kept_bytes(chosen, lambda: loss(args.tokens))
    with _Backward(layer.weight for layer in chosen) as live:
        found = loss(args.tokens)
        live.counting = True
        found.backward()
        live.counting = False
        del found
        grads = [p.grad for layer in chosen for p in layer.parameters() if p.grad is not None]
        gradient_bytes = sum({g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in grads}.values())
        del grads
        optimizer.step()
        optimizer.zero_grad()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return {
        "variant": name,
        "model": args.model,
        "rank": args.rank,
        "tokens": args.tokens,
        # activations of as many tokens as a weight has rows would count
        "dense_in_backward": None if any(args.tokens in layer.weight.shape for layer in chosen) else live.dense,
        "gradient_bytes": gradient_bytes,
        "kept_bytes": kept,
        "kept_at_first_bytes": kept_at_first,
        "state_bytes": sum(t.untyped_storage().nbytes() for t in state),
        "step_peak_bytes": live.peak,
    }


def kept_bytes(layers, forward):
    """Bytes of distinct storages that these layers keep for backward, what is there without them (parameters, bases) left out."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def wrapped(call, *args):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return call(*args)

    standing = set()
    for layer in layers:
        on = getattr(layer, "projection", None)
        tensors = [*layer.parameters(), *layer.buffers(), *(() if on is None else (*on.basis, on.omega))]
        standing |= {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
        layer.forward = functools.partial(wrapped, layer.forward)
    try:
        result = forward()  # noqa: F841  its graph keeps them
    finally:
        for layer in layers:
            del layer.forward
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in standing)
