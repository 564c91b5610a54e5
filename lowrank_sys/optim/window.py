"""A window: what has come of gradients since the last step of per_layer="accumulate"."""

from torch.multiprocessing.reductions import StorageWeakRef


class Window:
    """sketches: {weight: its SketchSum, or None where no basis is due} of what has had a gradient since the last step.

    averaged, sketches_averaged: whether the low-rank gradients so far are those of all ranks, and the sketches.
    """

    def __init__(self):
        self.sketches = {}
        self._stepped = {}  # weight -> which gradient the last step used
        self.averaged = self.sketches_averaged = False

    def open(self, weight, coefficient, new_sketch):
        """The sketch of a weight that gets a gradient, made by `new_sketch()` if it is the first one; None if no basis is due."""
        self.averaged = self.sketches_averaged = False
        if weight not in self.sketches:
            self.expect_new(weight, coefficient)
            self.sketches[weight] = new_sketch()
        return self.sketches[weight]

    def expect_new(self, weight, coefficient):
        """Raise a RuntimeError for the gradient that the last step used."""
        if coefficient.grad is not None and self._stepped.get(weight) == _identity(coefficient.grad):
            raise RuntimeError(
                "the last step's low-rank gradients are still there, and their basis may have changed since: "
                "call zero_grad() after step()"
            )

    def remember(self, weight, coefficient):
        """R was added to."""
        sketch = self.sketches.get(weight)
        if sketch is not None:
            sketch.version = coefficient.grad._version

    def clear(self):
        """Gradients begin anew."""
        self.sketches.clear()
        self.averaged = self.sketches_averaged = False

    def close(self, coefficients):
        """A step has used the gradients of {weight: coefficient}."""
        self.clear()
        self._stepped = {w: _identity(c.grad) for w, c in coefficients.items() if c.grad is not None}

    def forget(self):
        """Other states were loaded."""
        self.sketches.clear()
        self._stepped.clear()


def _identity(grad):
    return StorageWeakRef(grad.untyped_storage()), grad._version
