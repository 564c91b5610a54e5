"""LISA (Pan et al., NeurIPS 2024, arXiv:2403.17919): AdamW on a few layers at a time, drawn anew every so many steps."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.schedule.schedule import Sampled
from lowrank_sys.subspace.none import NoSubspace


# One layer at a time from the command line, whose smallest models have two or three.
@method("lisa", lr=1e-3, plain_lr=1e-2, rank=None, options={"active_layers": 1})
class LISA(Preset):
    """torch.optim.AdamW on `active_layers` (2) layers, drawn evenly every `period` (20) steps, and on what is in no layer, always.

    Layers that are not drawn are frozen: no gradients, no states. The authors' code keeps the states that a layer has had; here
    they are freed with it, and a layer that is drawn twice running keeps its own. Matrices are in groups with `rank` None;
    embeddings, head and final norm in the others. State of a matrix of a drawn layer: `exp_avg`, `exp_avg_sq`.
    """

    subspace, schedule = NoSubspace(), Sampled()
