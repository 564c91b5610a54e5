"""DCT-AdamW (Modoranu et al. 2025, arXiv:2505.17967): a basis of columns of the DCT, of which only the indices are kept."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import ErrorFeedback
from lowrank_sys.optim.types import Params, Rate
from lowrank_sys.subspace.columns import Columns


@method("dct", lr=8e-4, plain_lr=3e-3, scale=1.0, subspace="l1", update_proj_gap=1)
class DCTAdamW(Preset):
    """W <- (1 - lr*wd) W - lr*scale*back(Adam(R)), R the `rank` columns of S = G D of largest l1 norm, D the orthonormal DCT-II.

    Columns are chosen anew at every step. D is shared by all matrices of a width, and never kept; S comes from an FFT and is not
    stored. A moment of a column that stays chosen follows its index, and one that is new begins at zero: what D_oldᵀ D_new of the
    authors' `rotate_subspace` comes to. Group keys: those of lowrank_sys.subspace.columns.Columns, `scale` (1).

    Args:
        error_feedback: add what R leaves of a gradient to the next one; kept in the weight's dtype, where the authors also have 4
            and 8 bits.
        others: as of every preset.

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` fp32 (r, n) or (m, r), `columns` int32 (r,), `step`, the schedule; `error`.
    """

    subspace = Columns()
    low_rank_defaults = {"scale": 1.0}

    def __init__(self, params: Params, lr: Rate = 1e-3, *args, error_feedback: bool = False, **options) -> None:
        if error_feedback:
            self.remainder = ErrorFeedback()
        super().__init__(params, lr, *args, **options)
