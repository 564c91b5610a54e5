"""Low-rank gradient training of large language models: every hot path is a kernel behind a `torch.ops.lowrank` op."""

__version__ = "0.1.0"

from lowrank_sys import backends  # noqa: F401  registers the ops and their implementations
