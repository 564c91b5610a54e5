"""Trains a small model by every method, with the lowrank_sys that PYTHONPATH names, and writes every tensor of every step.

    python runner.py --root FOLDER [--save FOLDER | --resume FOLDER] [--only TEXT]

Uses lowrank_sys.optim, lowrank_sys.nn and torch alone, so that one file serves every revision. To stdout goes a stream of pickles
(case, step, tensors): `tensors` maps a name to (dtype, shape, bytes), or to a plain value; (case, None, message) stands for a
case that is refused. --save also writes a checkpoint of every case in the middle of a refresh gap, from which --resume goes on.
"""

import argparse
import contextlib
import pickle
import sys
from pathlib import Path

import torch
from torch import nn

import lowrank_sys
from lowrank_sys import nn as lowrank_nn
from lowrank_sys import optim

STEPS, GAP, SAVED = 30, 10, 14  # three matrices refresh in steps of their own; after 14 steps none of them is about to
RANK, VOCAB, TOKENS = 8, 60, 64
MAX_NORM = 1.2  # about that of the gradients: some are clipped, some are not
POISONED = 17  # the step with a gradient that is not finite

GALORE_KEYS = {
    "": {},
    "reset": {"moments": "reset"},
    "rotate": {"moments": "rotate"},
    "svd": {"subspace": "svd"},
    "next": {"refresh": "next", "moments": "rotate"},
    "left": {"proj_type": "left"},
    "right": {"proj_type": "right", "moments": "rotate"},
    "reverse": {"proj_type": "reverse_std"},
    "short": {"proj_type": "short-moments"},
    "int8 gemm": {"int8_gemm": True},
    "int4": {"quant": True, "quant_group_size": 32, "moments": "rotate"},
    "adaptive": {"cos_threshold": 0.1, "queue_size": 1},
}
CODED = {"min_8bit_size": 256}
SOME = ("", "reset", "rotate", "next", "left", "short", "int4")

# name -> (optimizer, keys of its low-rank groups, its arguments); those of MODES run in every mode.
METHODS = {
    **{f"galore {name}": ("GaLoreAdamW", keys, {}) for name, keys in GALORE_KEYS.items()},
    **{f"galore8bit {name}": ("GaLoreAdamW8bit", GALORE_KEYS[name], CODED) for name in SOME},
    "adafactor": ("GaLoreAdafactor", {}, {}),
    "adafactor momentum": ("GaLoreAdafactor", {"proj_type": "left"}, {"beta1": 0.9, "lr": 1e-2, "relative_step": False}),
    "adafactor int4": ("GaLoreAdafactor", {"quant": True, "quant_group_size": 32}, {}),
    "q-galore": ("QGaLoreAdamW8bit", {"quant_group_size": 32, "queue_size": 1}, CODED),
    "q-galore dense": ("QGaLoreAdamW8bit", {"quant": False, "moments": "rotate"}, CODED),
    "q-galore left": ("QGaLoreAdamW8bit", {"proj_type": "left", "quant_group_size": 32, "moments": "reset"}, CODED),
    **{
        f"grass {subspace} {side}": ("GrassAdamW", {"subspace": subspace, "proj_type": side}, {})
        for subspace in ("top", "sample", "sample_replace")
        for side in ("left", "right")
    },
    "grass keep": ("GrassAdamW", {"moments": "keep"}, {}),
    "apollo": ("APOLLOAdamW", {"scale": 4.0}, {}),
    "apollo left": ("APOLLOAdamW", {"proj_type": "left", "moments": "reset"}, {}),
    "apollo right": ("APOLLOAdamW", {"proj_type": "right", "refresh": "next"}, {}),
    "apollo svd": ("APOLLOAdamW", {"proj": "svd", "moments": "rotate"}, {}),
    "apollo tensor": ("APOLLOAdamW", {"scale_type": "tensor"}, {"scale_front": True}),
    "apollo mini": ("APOLLOAdamW", {"rank": 1, "scale_type": "tensor", "scale": 128.0}, {}),
    "apollo no limiter": ("APOLLOAdamW", {}, {"disable_nl": True}),
    "apollo plain 8bit": ("APOLLOAdamW", {"min_8bit_size": 256}, {"plain_8bit": True}),
    "fira": ("FiraAdamW", {}, {}),
    "fira left": ("FiraAdamW", {"proj_type": "left", "moments": "rotate", "alpha": 1.0}, {}),
    "frugal": ("FrugalAdamW", {}, {}),
    "frugal keep": ("FrugalAdamW", {"proj_type": "left", "moments": "keep", "residual_scale": 0.1}, {}),
    "frugal sgd": ("FrugalAdamW", {"proj_type": "right"}, {"inactive_update_rule": "sgd"}),
}
EVERY_MODE = (
    "galore ",
    "galore rotate",
    "galore int4",
    "galore8bit ",
    "adafactor",
    "q-galore",
    "grass sample left",
    "apollo",
    "apollo svd",
    "apollo mini",
    "fira",
    "frugal",
)
# name -> (bf16, INT8 weights)
WEIGHTS = {"fp32": (False, False), "bf16": (True, False), "int8": (False, True), "int8 bf16": (True, True)}
# name -> per_layer
MODES = {
    "plain": lambda: None,
    "clipped": lambda: None,
    "clipped in R": lambda: None,
    "poisoned": lambda: None,
    "scaled": lambda: None,
    "accumulate": lambda: "accumulate",
    "accumulate clipped": lambda: "accumulate",
    "accumulate bf16": lambda: optim.Accumulate(torch.bfloat16),
    "in_backward": lambda: "in_backward",
    "in_backward clipped": lambda: optim.InBackward(MAX_NORM),
}


def cases():
    """{name: (method, weights, mode)}"""
    return {
        f"{method.strip()}, {weights}, {mode}": (method, weights, mode)
        for method in METHODS
        for weights in WEIGHTS
        for mode in MODES
        if mode == "plain" or (method in EVERY_MODE and weights in ("fp32", "int8"))
    }


def batch(time):
    """The tokens of a step."""
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(time))


class Run:
    """One case: the model, its optimizer, and its training."""

    def __init__(self, method, weights, mode):
        bf16, int8 = WEIGHTS[weights]
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(VOCAB, 48), nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 48), nn.Linear(48, 48), nn.LayerNorm(48)
        )
        model.add_module("head", nn.Linear(48, VOCAB))
        self.model = model.to(torch.bfloat16 if bf16 else torch.float32)
        if int8:
            lowrank_nn.quantize_model(self.model, group_size=32)
        self.weights = list(self.model.state_dict())
        self.mode, self.micro, self.time = mode, 2 if mode.startswith("accumulate") else 1, 0
        if mode in ("poisoned", "scaled"):
            self.model[1].weight.register_hook(self.poison)
        name, keys, options = METHODS[method]
        if mode == "clipped in R":
            keys = {**keys, "refresh": "next"}
        groups = optim.param_groups(self.model, **{"rank": RANK, "update_proj_gap": GAP, **keys})
        options = {"weight_decay": 0.1, **({} if name == "GaLoreAdafactor" else {"lr": 1e-2}), **options}
        self.optimizer = getattr(optim, name)(groups, **options, per_layer=MODES[mode]())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4, enabled=mode == "scaled")

    def poison(self, grad):
        if self.time != POISONED:
            return grad
        grad = grad.clone()
        grad[3, 5] = torch.nan
        return grad

    def loss(self, ids):
        return nn.functional.cross_entropy(self.model(ids).float(), ids.roll(1))

    def step(self):
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            if rate is not None:
                group["lr"] = rate * (1 - self.time / 60)
        for part in batch(self.time).chunk(self.micro):
            self.scaler.scale(self.loss(part) / self.micro).backward()
        if self.mode in ("clipped", "accumulate clipped"):
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        elif self.mode == "clipped in R":
            self.optimizer.clip_grad_norm_(MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.time += 1

    def tensors(self):
        """What is trained and what is kept, by name."""
        model, saved = self.model.state_dict(), self.optimizer.state_dict()
        found = {name: model[name] for name in self.weights}
        names = {i: name for g in saved["param_groups"] for i, name in zip(g["params"], g["param_names"])}
        for i, state in saved["state"].items():
            found |= {f"{names[i]}: {key}": value for key, value in state.items()}
        return {name: plain(value) for name, value in found.items()} | {"skipped": self.optimizer.skipped()}

    def save(self, path):
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(saved, path)

    def load(self, path):
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.time = SAVED


def plain(value):
    """(dtype, shape, bytes) of a tensor; another value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(value.dtype).removeprefix("torch."), tuple(value.shape), bits.numpy().tobytes()


def run(name, case, save, resume):
    """Yield (name, step, tensors) of a case, or (name, None, why it is refused)."""
    try:
        run = Run(*case)
        if resume is not None:
            run.load(resume / f"{name}.pt")
        run.step()
    except (ValueError, RuntimeError) as error:
        yield name, None, str(error)
        return
    while True:
        yield name, run.time - 1, run.tensors()
        if run.time == STEPS:
            return
        if save is not None and run.time == SAVED:
            run.save(save / f"{name}.pt")
        run.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder that lowrank_sys must come from")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if not Path(lowrank_sys.__file__).is_relative_to(arguments.root):
        sys.exit(f"lowrank_sys must come from {arguments.root}, got {lowrank_sys.__file__}")
    torch.set_num_threads(1)
    out = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):
        for name, case in cases().items():
            if arguments.only not in name or (arguments.resume and not (arguments.resume / f"{name}.pt").exists()):
                continue
            for result in run(name, case, arguments.save, arguments.resume):
                pickle.dump(result, out)
        out.flush()


if __name__ == "__main__":
    main()
