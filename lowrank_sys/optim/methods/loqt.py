"""LoQT (Loeschcke et al., NeurIPS 2024, arXiv:2405.16528): low-rank factors on quantized weights, merged ever more rarely."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.rules import Adam
from lowrank_sys.subspace.orthonormal import Orthonormal


class GrowingGap(Orthonormal):
    """Orthonormal whose refresh k waits update_proj_gap + int(gap_growth^k) steps for the next, k = 1 at the second basis.

    `compensation`: alternations of a merge (lowrank_sys.optim.merging).

    State of a matrix: that of Orthonormal, and `refreshes`, on the host.
    """

    defaults = {**Orthonormal.defaults, "gap_growth": 1.2, "compensation": 5}
    categories = {**Orthonormal.categories, "merges": "counters"}
    on_host, hyper = (*Orthonormal.on_host, "merges"), (*Orthonormal.hyper, "gap_growth")
    capturable = False  # the host says when a part is merged

    def init(self, state, param, group, index, count):
        shape = super().init(state, param, group, index, count)
        state.setdefault("refreshes", torch.tensor(0, device="cpu"))
        return shape

    def gap(self, due):
        if due.first:
            return super().gap(due)
        more = int(due.h["gap_growth"] ** (int(due.state["refreshes"]) - 1))
        return self.aligned(due, int(due.h["update_proj_gap"]) + more)


@method("loqt", lr=5e-3, plain_lr=3e-3, update_proj_gap=100, weights="nf4")
class LoQT(Preset):
    """W = Q + back(X): Q quantized and frozen in a gap, X <- (1 - lr*wd) X - lr scale Adam(project(G)) on a basis in INT4.

    At a refresh the part is merged, Q and X begin anew as the pair nearest to W of `compensation` (5) alternations
    (lowrank_sys.optim.merging), and the gap grows: update_proj_gap (100) + int(gap_growth (1.2)^k). Moments stay as they are.
    Weights are NF4 or INT8 (lowrank_sys.nn.quantize_model); float ones take the steps themselves, with nothing to merge.
    With project_model no gradient of a weight's size is made.

    Where the authors' code differs: its basis is in NF4, X is a parameter under its own 8-bit Adam (here `bits=8`), all matrices
    merge in one step, which is left out, and of the alternations the factor of the pair is older than the codes.
    Group keys: those of GaLoreAdamW, `quant` (True), `quant_group_size`, `compensation`, `gap_growth`.
    State of a matrix: that of GaLoreAdamW with the basis in INT4, and `refreshes`; of a quantized weight `merges`, and in its layer
    the factor, fp32 of R's shape, with a basis of its own.
    """

    rule, subspace = Adam(), GrowingGap()
    low_rank_defaults = {"quant": True, "update_proj_gap": 100}
