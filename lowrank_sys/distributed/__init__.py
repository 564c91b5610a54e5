"""Several processes that train one model."""

from lowrank_sys.distributed.hook import LowRankState, low_rank_hook
from lowrank_sys.distributed.world import World

__all__ = ["LowRankState", "World", "low_rank_hook"]
