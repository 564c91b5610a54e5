"""The base of all rules."""

from lowrank_sys.subspace.shards import Part
from lowrank_sys.subspace.transport import TRANSPORTS


class Rule(Part):
    """An update from a gradient R and its moments: everything a method of this kind is.

    name: in the table of fused steps; None has no fused step. defaults: its hyper-parameters. checks: what those of them may hold
    that lowrank_sys.optim.hyper.RULES does not know as it means them. state: {name: Moment}. plain: the
    rule of parameters without a rank, itself by default. transports: what may become of its moments at a refresh.
    """

    name = None
    defaults = {}
    checks = {}
    state = {}
    keys = set()  # group keys of all rules

    def __init_subclass__(cls):
        Rule.keys |= cls.defaults.keys()

    @property
    def plain(self):
        return self

    @property
    def names(self):
        """All names that its moments may have."""
        return tuple(self.state)

    @property
    def transports(self):
        return tuple(TRANSPORTS)

    def moments(self, shape, h):
        """{name: Moment} for a gradient of this shape."""
        return self.state

    def returns_gradient(self, h):
        """Whether X is R itself, without a state."""
        return False

    def rates(self, lr, s, h):
        """(what weight decay is multiplied by, what the update is multiplied by); 0-dim each."""
        return lr, lr

    def update(self, r, s, h):
        """The update from R (fp32, zero where not s.ok), as a new tensor.

        s: moments as attributes, fp32, to be written in place or replaced; s.step, s.ok. h: the group.
        """
        raise NotImplementedError
