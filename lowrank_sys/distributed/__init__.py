"""Several processes that train one model."""

from lowrank_sys.distributed.world import World

__all__ = ["World"]
