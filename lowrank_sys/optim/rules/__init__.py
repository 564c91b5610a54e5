"""Rules: what becomes of a (low-rank) gradient. Each declares its moments and returns the update; it knows nothing else."""

from lowrank_sys.optim.rules.adafactor import Adafactor
from lowrank_sys.optim.rules.adam import Adam, RatioAdam
from lowrank_sys.optim.rules.momentum import Lion, Momentum, NoRule, Unchanged
from lowrank_sys.optim.rules.rule import Rule
from lowrank_sys.optim.rules.spectral import Muon, OneSided

__all__ = ["Adafactor", "Adam", "Lion", "Momentum", "Muon", "NoRule", "OneSided", "RatioAdam", "Rule", "Unchanged"]
