"""OwLore (Li et al. 2024, arXiv:2405.18380): GaLore on a few layers at a time, drawn in proportion to their outliers."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.schedule.schedule import Sampled


# One layer at a time from the command line, whose smallest models have two or three.
@method("owlore", lr=5e-3, plain_lr=1e-2, scale=1.0, update_proj_gap=100, options={"active_layers": 1})
class OwLore(Preset):
    """GaLoreAdamW on `active_layers` (2) layers, drawn every `period` (20) steps in proportion to `scores`; the others are frozen.

    scores: {layer: score}, as lowrank_sys.schedule.outliers.outlier_scores(model, batches) makes them; None draws evenly. A layer's
    states and bases are freed when it is frozen, which the authors' code does not do. Group keys: those of GaLoreAdamW, `scale` 1,
    `update_proj_gap` 100. State of a matrix of a drawn layer: that of GaLoreAdamW.
    """

    low_rank_defaults = {"scale": 1.0, "update_proj_gap": 100}
    schedule = Sampled()
