"""Types of what users hand to optimizers."""

from typing import Any, Literal, TypeAlias

import torch
from torch.optim.optimizer import ParamsT

Params: TypeAlias = ParamsT
Rate: TypeAlias = float | torch.Tensor
Betas: TypeAlias = tuple[float, float]
NonFinite: TypeAlias = Literal["skip", "raise"]
PerLayer: TypeAlias = Literal["accumulate", "in_backward"] | Any | None  # Any: an Accumulate or an InBackward
