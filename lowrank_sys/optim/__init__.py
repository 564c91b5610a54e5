"""Optimizers: parts that keep state and call ops, composed by LowRankOptimizer; every method is a short preset."""

from lowrank_sys.optim.accumulate import Accumulate
from lowrank_sys.optim.captured import CapturedStep
from lowrank_sys.optim.continual import PastTasks
from lowrank_sys.optim.gradients import AtStep
from lowrank_sys.optim.groups import param_groups
from lowrank_sys.optim.in_backward import InBackward
from lowrank_sys.optim.methods.apollo import APOLLOAdamW
from lowrank_sys.optim.methods.asgo import ASGO
from lowrank_sys.optim.methods.coap import COAPAdamW
from lowrank_sys.optim.methods.dct import DCTAdamW
from lowrank_sys.optim.methods.fira import FiraAdamW
from lowrank_sys.optim.methods.fira_lion import FiraLion
from lowrank_sys.optim.methods.flora import Flora
from lowrank_sys.optim.methods.frugal import FrugalAdamW
from lowrank_sys.optim.methods.frugal_blocks import FrugalBlocks
from lowrank_sys.optim.methods.galore import GaLoreAdamW, GaLoreAdamW8bit
from lowrank_sys.optim.methods.galore_adafactor import GaLoreAdafactor
from lowrank_sys.optim.methods.galore_lion import GaLoreLion
from lowrank_sys.optim.methods.galore_plus import GaLorePlus
from lowrank_sys.optim.methods.grades import GradES
from lowrank_sys.optim.methods.gradnormlorp import GradNormLoRP
from lowrank_sys.optim.methods.grass import GrassAdamW
from lowrank_sys.optim.methods.gum import GUM
from lowrank_sys.optim.methods.ldadam import LDAdamW
from lowrank_sys.optim.methods.lisa import LISA
from lowrank_sys.optim.methods.loqt import LoQT
from lowrank_sys.optim.methods.mofasgd import MoFaSGD
from lowrank_sys.optim.methods.muon import Muon
from lowrank_sys.optim.methods.osd import OnlineSubspaceDescent
from lowrank_sys.optim.methods.owlore import OwLore
from lowrank_sys.optim.methods.qgalore import QGaLoreAdamW8bit
from lowrank_sys.optim.methods.sara import SARAAdamW
from lowrank_sys.optim.methods.scale import SCALE
from lowrank_sys.optim.methods.sinkgd import SinkGD
from lowrank_sys.optim.methods.snsm import SNSM
from lowrank_sys.optim.methods.subtrack import SubTrackAdamW
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.welore import WeLoreRanks, welore_ranks

__all__ = [
    "Accumulate",
    "APOLLOAdamW",
    "ASGO",
    "AtStep",
    "CapturedStep",
    "COAPAdamW",
    "DCTAdamW",
    "FiraAdamW",
    "FiraLion",
    "Flora",
    "FrugalAdamW",
    "FrugalBlocks",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLorePlus",
    "GradES",
    "GradNormLoRP",
    "GrassAdamW",
    "GUM",
    "InBackward",
    "LDAdamW",
    "LISA",
    "LoQT",
    "LowRankOptimizer",
    "MoFaSGD",
    "Muon",
    "OnlineSubspaceDescent",
    "OwLore",
    "param_groups",
    "PastTasks",
    "QGaLoreAdamW8bit",
    "SARAAdamW",
    "SCALE",
    "SinkGD",
    "SNSM",
    "SubTrackAdamW",
    "welore_ranks",
    "WeLoreRanks",
]
