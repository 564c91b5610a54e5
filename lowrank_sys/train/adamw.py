from __future__ import annotations

import torch


class SkippingAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (fused) that leaves out the whole step when a gradient is not finite.

    One NaN would otherwise stay in the moments, and so in the weight, for ever. The step is left out on the device,
    its counter included: nothing synchronises before `skipped` is called.
    """

    def __init__(self, params, **kwargs):
        super().__init__(params, fused=True, **kwargs)
        self._skipped = None

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # a norm beyond fp32 is left out as well: its square would stay in the second moment as inf
        norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
        self.found_inf = (~norms.isfinite().all()).float()
        left_out = self.found_inf.double() * sum(p.numel() for p in params)
        self._skipped = left_out if self._skipped is None else self._skipped + left_out
        return super().step(closure)

    def skipped(self) -> int:
        """Number of weight elements left untouched so far; reads the device."""
        return 0 if self._skipped is None else int(self._skipped)
