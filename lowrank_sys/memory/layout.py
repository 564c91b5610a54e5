"""What of a run stays between its steps, piece by piece, and the matrices whose bases are renewed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lowrank_sys.nn.coefficient import is_coefficient
from lowrank_sys.nn.quant_weight import is_quantized, tensors_of
from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.subspace.basis import store_of
from lowrank_sys.subspace.iteration import sketched_columns
from lowrank_sys.subspace.matrices import each

# Categories that fsdp deals out by rows; gradients too, by those of their weights.
SHARDED = ("weights", "moments", "scales")


class Piece(NamedTuple):
    """A tensor that stays between steps. rows: of its parameter, if it is dealt out by them, else 0."""

    category: str
    bytes: int
    rows: int


class Matrix(NamedTuple):
    """A matrix in a group with a rank: its basis is (d, r) in a type of `size` bytes, R has `low_rank` elements, a sketch `columns`
    columns, 0 where a basis needs no gradient; a basis lasts `gap` steps."""

    d: int
    r: int
    size: int
    low_rank: int
    columns: int
    gap: int


class Layout(NamedTuple):
    """What the arithmetic needs of a run.

    pieces: weights and state. gradients: of the trained parameters, in bytes, with their rows. plain: bytes of the gradients that
    no subspace takes. matrices: those that have one. layers, rest: bytes of the weights of each layer that is sharded by itself,
    and of all others. layer_gradients: of the gradients of each layer.
    """

    pieces: tuple[Piece, ...]
    gradients: tuple[Piece, ...]
    plain: int
    matrices: tuple[Matrix, ...]
    layers: tuple[int, ...]
    layer_gradients: tuple[int, ...]
    rest: int


def layout(model: nn.Module, optimizer: LowRankOptimizer) -> Layout:
    """The Layout of a model and its optimizer, after a step."""
    pieces, gradients, matrices, plain = [], [], [], 0
    kinds = {"step": "counters", **optimizer.pipeline.categories()}
    pieces += [Piece("weights", _bytes(p), _rows(p)) for p in _distinct(model.parameters())]
    coded = {id(tensor) for p in model.parameters() if is_quantized(p) for tensor in tensors_of(p)}
    pieces += [Piece("weights", _bytes(b), 0) for b in _distinct(model.buffers()) if id(b) not in coded]
    for group in optimizer.param_groups:
        for param in weights(group):
            rows = _rows(param)
            gradients.append(Piece("gradients", _bytes_of_gradient(param), rows))
            plain += 0 if "rank" in group else gradients[-1].bytes
            state = optimizer.state[param]
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    kind = kinds.get(key, "other")
                    pieces.append(Piece(kind, _bytes(value), rows if kind in SHARDED and value.dim() else 0))
            if "rank" in group:
                matrices += _matrices(optimizer.pipeline.subspace, group, param, state)
    of_layers = [_distinct(layer.parameters()) for layer in _layers(model)]
    layers = [sum(map(_bytes, params)) for params in of_layers]
    of_gradients = [sum(_bytes_of_gradient(p) for p in params if p.requires_grad) for params in of_layers]
    whole = sum(piece.bytes for piece in pieces if piece.category == "weights" and piece.rows)
    return Layout(tuple(pieces), tuple(gradients), plain, tuple(matrices), tuple(layers), tuple(of_gradients), whole - sum(layers))


def _matrices(subspace, group, param, state):
    """A Matrix for each of the matrices of a weight."""
    for matrix, _, one in each(param, None, state):
        if store_of(one) is None:
            continue
        r, other = sorted(subspace.shape_of(matrix, one))
        d = sum(matrix.shape) - other
        columns = 0 if subspace.blind or not store_of(one).reads_all else sketched_columns(r, d, other)
        yield Matrix(d, r, matrix.element_size(), r * other, columns, group.get("update_proj_gap", 1))


def _layers(model):
    """The longest list of modules: the layers of a transformer."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=())


def _distinct(tensors):
    return {id(tensor): tensor for tensor in tensors if not is_coefficient(tensor)}.values()


def _rows(param):
    return param.shape[0] if param.dim() else 1


def _bytes_of_gradient(param):
    return param.numel() * param.element_size()


def _bytes(tensor):
    if is_quantized(tensor):
        return sum(map(_bytes, tensors_of(tensor)))
    return tensor.numel() * tensor.element_size()
