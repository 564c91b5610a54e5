"""GradES (Wen et al. 2025, arXiv:2509.01842): AdamW, and a matrix whose gradient has become small stops for good."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.schedule.settling import Settling
from lowrank_sys.subspace.none import NoSubspace


@method("grades", lr=3e-4, plain_lr=1e-2, rank=None)
class GradES(Preset):
    """torch.optim.AdamW; a matrix is frozen, and its state freed, once the sum of |G|'s entries is below `tau` (1).

    Looked at every `period` (10) steps, after the first `grace` (100): each look makes the host wait for a GPU. The paper looks at
    every step; its first version, of which this is, at the gradient's own size, a later one at its change. `tau` is for its models
    one by one: entries add up, so that a wider matrix needs a larger one. Groups with `rank` None.
    State of a matrix: `exp_avg`, `exp_avg_sq`, `calm`, of the last look; of a frozen one none.
    """

    subspace, schedule = NoSubspace(), Settling()
