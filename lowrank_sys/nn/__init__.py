"""Layers and losses that need less memory: linear layers on INT8 weights, low-rank gradients, the loss without its logits."""

from lowrank_sys.nn.channel_sparse import ChannelSparseLinear
from lowrank_sys.nn.chunked_loss import causal_lm_loss, chunked_loss
from lowrank_sys.nn.factored import FactoredLinear
from lowrank_sys.nn.factorize import factorize_model, merge_factors
from lowrank_sys.nn.from_config import quantized_from_config
from lowrank_sys.nn.pretrained import quantized_from_pretrained, save_quantized
from lowrank_sys.nn.project import compare_sides, project_model, unproject_model
from lowrank_sys.nn.projected_linear import ProjectedLinear
from lowrank_sys.nn.quant_linear import QuantLinear
from lowrank_sys.nn.quant_shards import shardable
from lowrank_sys.nn.quant_weight import QuantWeight, is_quantized
from lowrank_sys.nn.quantize import dequantize_model, quantize_model
from lowrank_sys.nn.sparse_low_rank import SparseLowRankLinear

__all__ = [
    "ChannelSparseLinear",
    "FactoredLinear",
    "ProjectedLinear",
    "QuantLinear",
    "QuantWeight",
    "SparseLowRankLinear",
    "causal_lm_loss",
    "chunked_loss",
    "compare_sides",
    "dequantize_model",
    "factorize_model",
    "is_quantized",
    "merge_factors",
    "project_model",
    "quantize_model",
    "quantized_from_config",
    "quantized_from_pretrained",
    "save_quantized",
    "shardable",
    "unproject_model",
]
