"""What an optimizer can do for factors B A of a weight: adjusted gradients of the pair, its first basis, its balance.

For adapters of peft, and for the factored layers of lowrank_sys.nn; with any torch optimizer. See docs/lora.md.
"""

from lowrank_sys.lora.adjust import adjust_gradients
from lowrank_sys.lora.gradients import full_gradients
from lowrank_sys.lora.pairs import Pair, pairs
from lowrank_sys.lora.refactorize import refactorize
from lowrank_sys.lora.rules import lora_pro, riemannian
from lowrank_sys.lora.start import gora_, gora_ranks, lora_one_

__all__ = [
    "Pair",
    "adjust_gradients",
    "full_gradients",
    "gora_",
    "gora_ranks",
    "lora_one_",
    "lora_pro",
    "pairs",
    "refactorize",
    "riemannian",
]
