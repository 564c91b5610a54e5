"""Q-GaLore (Zhang et al. 2024, arXiv:2407.08296): GaLore with a basis in INT4, 8-bit moments, and refreshes that grow rarer."""

from lowrank_sys.optim.methods.galore import FINE_TUNED, GaLoreAdamW8bit
from lowrank_sys.optim.preset import method


@method("q-galore", lr=5e-3, plain_lr=3e-3, weights="int8", fine_tuning=FINE_TUNED)
class QGaLoreAdamW8bit(GaLoreAdamW8bit):
    """GaLoreAdamW8bit on bases in INT4, with a gap of its own for each matrix that doubles while its subspace stays.

    Group keys as q_galore_torch's, with its defaults: `rank`, `update_proj_gap` (200: the first gap), `scale` (0.25),
    `proj_type` (any of GaLoreAdamW's), `quant` (True; False keeps the basis in the weight's dtype), `quant_n_bit` (4, the only
    one), `quant_group_size` (256), `cos_threshold` (0.4; None: a fixed gap), `gamma_proj` (2) and `queue_size` (5); and
    `max_update_proj_gap` (16 update_proj_gap). Arguments as GaLoreAdamW8bit. `refreshes()` shows the gaps.

    Where q_galore_torch differs: it stores 4 bits in a byte, here two codes share one; it clamps the zero point, which destroys
    groups of one sign, here the offset is fp32; it compares the signed first vectors of two bases, here their subspaces
    (lowrank_sys.subspace.gap): |B_oldᵀB_new|²/r, which is r/d for random ones, so a cos_threshold below r/d always doubles.

    State of a matrix (m, n): that of GaLoreAdamW8bit, with `basis` uint8 (r, ⌈d/2⌉), `basis_scale` and `basis_offset` fp32
    (r, ⌈d/quant_group_size⌉), d = m or n; `gap` (host) and `overlaps` (queue_size,).
    """

    low_rank_defaults = {"quant": True, "cos_threshold": 0.4}
