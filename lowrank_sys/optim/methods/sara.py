"""SARA (Zhang et al., NeurIPS 2025, arXiv:2502.05790): singular vectors drawn by their singular values, not the leading ones."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.subspace.gaussian import gaussian_basis
from lowrank_sys.subspace.iteration import svd_basis
from lowrank_sys.subspace.select import SELECT, Selector


class ImportanceSampled(Selector):
    """`rank` of all singular vectors of G, drawn without replacement, each time one of those left in proportion to its value.

    The first r of a race: times E_i / sigma_i, E_i exponential, of a Philox stream that follows from the seed and the refresh.
    """

    counts, staggered, sharded = True, False, True

    def choose(self, due):
        most = min(due.shard.rows or due.raw.shape[0], due.raw.shape[1])
        vectors, energies = svd_basis(due.gradient, None, rank=most, left=due.left, shard=due.shard)
        where = {"device": vectors.device, "seed": due.seed, "step": int(due.state["refreshes"]), "parameter": 0}
        exponential = gaussian_basis(d=2, rank=len(energies), **where).square().sum(0)
        chosen = (exponential / energies.sqrt()).topk(due.rank, largest=False).indices.sort().values
        new, energies = vectors[:, chosen], energies[chosen]
        return new if due.old is None else torch.where((energies > 0).any(), new, due.old.to(new.dtype)), energies


SELECT["sara"] = ImportanceSampled()


@method("sara", lr=5e-3, plain_lr=3e-3, subspace="sara")
class SARAAdamW(Preset):
    """GaLoreAdamW on singular vectors drawn by their values, the first moment carried into each new basis: M <- B_newᵀ B_old M.

    Group keys: those of GaLoreAdamW; `moments` (rotate-first, the re-projection of the paper's proof; the authors compute and drop
    it, which is 'keep'). `subspace="sara"` serves other methods too: with FiraAdamW it is the paper's Fira-SARA.
    State of a matrix: that of GaLoreAdamW, and `refreshes`.
    """

    low_rank_defaults = {"subspace": "sara", "moments": "rotate-first"}
