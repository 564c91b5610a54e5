"""The sketch of a window beside its R."""


class SketchSum:
    """Y = G Omega, summed over a window beside R. Of each gradient `expect` and `add` are called once, in any order."""

    def __init__(self, omega):
        self.omega = omega
        self.total = None
        self.version = None  # of the accumulated R after the last sum
        self._expected, self._waiting = False, None

    def expect(self, low_rank_grad):
        """R so far, before a gradient is added; if zero_grad was called since the last one, the sum is zeroed too."""
        if low_rank_grad is None:
            self.total = None
        elif self.total is not None and low_rank_grad._version != self.version:
            self.total.masked_fill_(~low_rank_grad.any(), 0)
        waiting, self._waiting, self._expected = self._waiting, None, True
        if waiting is not None:
            self.add(waiting)

    def add(self, product):
        """The sketch of that gradient, which is taken."""
        if not self._expected:
            self._waiting = product
        elif self.total is None:
            self.total, self._expected = product, False
        else:
            self.total.add_(product)
            self._expected = False
