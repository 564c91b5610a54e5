"""When a basis is chosen anew: the schedule of all matrices, and what one that is due hands to the parts that renew it."""

import torch

from lowrank_sys._ops.blockwise import expect_codes
from lowrank_sys._ops.rules import check_lists, expect, expect_dtype, expect_like, expect_number, expect_scalar, fake
from lowrank_sys.subspace.moments import absmax_of, decode, encode, is_coded
from lowrank_sys.subspace.shards import Shard
from lowrank_sys.subspace.transport import TRANSPORTS

OP = "refresh_"

# A countdown of COLD says that there is no basis of the gradient yet.
COLD = -1

# Kinds of subspaces by name (lowrank_sys.subspace.subspace.Subspace registers each).
KINDS = {}


class Due:
    """A matrix whose basis is due.

    state: its tensors and integers. raw: G (m, n), or with `sketched` the sketch Y = G Omega (d, l), right: (l, d), as it came.
    first: whether it has had no gradient's basis yet. moments: {name: whether it has a sign}. h: numbers of its group.
    shard: that the rows of G are of; a sketch, (l, d), is that of the rows here.
    select, transport: names of what renews it. lr: 0-dim, of the step. training: False for a rate of 0.
    """

    def __init__(self, state, gradient, first, call):
        self.state, self.first = state, first
        self.raw, self._scale, self._go = gradient, call.scale, call.go
        self.left, self.lr, self.seed = call.left, call.lr, state.get("seed")
        self.sketched, self.training, self.h = call.sketched, call.training, call.h
        self.select, self.transport, self.moments = call.select, call.transport, call.moments
        self.shard = Shard(state.get("offset", 0) // max(1, gradient.shape[-1]), state.get("rows"), call.sums)
        self.old = self.rank = None  # the basis (d, r) as it is, and r: for selectors
        self.sized = False  # whether the selector asks for the size of the gradient
        self.mean = None  # of the last overlaps, where the gap is the matrix's own

    @property
    def gradient(self):
        """`raw`, without a GradScaler's factor where the selector asks for its size; NaN, which chooses nothing, in a step that is
        none. A copy in these cases, to be dropped soon."""
        scaled = self.raw if self._scale is None or not self.sized else self.raw.float() * self._scale
        return scaled if self._go is None else torch.where(self._go, scaled, torch.nan)

    def moment(self, name):
        """A moment of R's shape, fp32."""
        return decode(self.state, name, self.moments[name])

    def write(self, name, value, kept):
        """Store a moment; where the basis was `kept` (0-dim bool) codes keep their bytes."""
        encode(self.state, name, self.moments[name], value, kept)

    def forget(self, step=True):
        """Zero the moments, and the step."""
        for name in self.moments:
            self.state[name].zero_()
            if is_coded(self.state, name):
                self.state[absmax_of(name)].zero_()
        if step:
            self.state["step"].zero_()


class Call:
    """The arguments of `refresh_`, by matrix."""

    def __init__(
        self, tensors, gradients, numbers, lr, *, kind, select, transport, keys, number_keys, moments, signed, hyper_keys, hyper,
        left, sketched, sums="", grad_scale=None, found_inf=None,
    ):  # fmt: skip
        _expect_names(kind, select, transport)
        _expect_lists(tensors, gradients, numbers, keys, number_keys, moments, signed, hyper_keys, hyper)
        self.kind, self.select, self.transport = KINDS[kind], select, transport
        self.left, self.lr, self.sketched, self.sums, self.training = left, lr, sketched, sums, None
        expect(not sums or not left, OP, lambda: "left must be False for shards of rows, got True")
        self.moments, self.h = dict(zip(moments, signed)), dict(zip(hyper_keys, hyper))
        self.scale = None if grad_scale is None else grad_scale.reshape(())
        self.go = None if found_inf is None else found_inf.reshape(()) == 0
        self.gradients = gradients
        self._tensors, self._keys = tensors, keys
        self._numbers, self._number_keys = numbers, number_keys
        self.countdowns = self.column("countdown")
        self._expect_schedule(lr, (grad_scale, found_inf))

    def _expect_schedule(self, lr, guards):
        expect_number(OP, "lr", lr, lr.device)
        for name, guard in zip(("grad_scale", "found_inf"), guards):
            if guard is not None:
                expect(guard.numel() == 1, OP, lambda: f"{name} must have one element, got shape {tuple(guard.shape)}")
                expect_dtype(OP, name, guard, torch.float32)
        expect("update_proj_gap" in self.h, OP, lambda: f"hyper_keys must name update_proj_gap, got {', '.join(self.h)}")
        gap = self.h["update_proj_gap"]
        expect(gap >= 1, OP, lambda: f"update_proj_gap must be at least 1, got {gap}")
        if "first_gap" in self._number_keys:
            first = self._numbers[self._number_keys.index("first_gap") :: len(self._number_keys)]
            expect(min(first, default=1) >= 1, OP, lambda: f"first_gap must be at least 1, got {min(first)}")
        # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
        for i, c in enumerate(self.countdowns):
            if not (c.dtype is torch.int64 and c.dim() == 0 and c.is_cpu):
                expect_on_host(f"countdown of matrix {i}", c)

    def waits(self):
        """The countdowns as numbers; a choice of which a GPU has found since that it was none is due again."""
        waits = [countdown.item() for countdown in self.countdowns]
        missed = self.column("missed") if "missed" in self._keys else ()
        for i, verdict in enumerate(torch.stack(missed).tolist() if missed else ()):
            if verdict and waits[i] > 0:
                missed[i].zero_()
                if self.sketched:  # the next step takes its sketch
                    self.countdowns[i].fill_(1)
                else:
                    waits[i] = 0
        return waits

    def column(self, key):
        """One tensor of the state of each matrix."""
        return self._tensors[self._keys.index(key) :: len(self._keys)]

    def due(self, i, wait):
        """Matrix i, of which `wait` is the countdown."""
        t, n = len(self._keys), len(self._number_keys)
        state = dict(zip(self._keys, self._tensors[i * t : (i + 1) * t]))
        state.update(zip(self._number_keys, self._numbers[i * n : (i + 1) * n]), left=self.left)
        return Due(state, self.gradients[i], wait == COLD, self)

    def is_due(self, i, wait):
        """Whether matrix i, whose countdown has ended, is renewed in this call."""
        if self.kind.blind:
            return True
        if self.sketched:  # without a sketch a matrix keeps its basis, and stays due
            return is_due(wait) and self.gradients[i].numel() > 0
        return True


def refresh_(tensors, gradients, numbers, lr, *, sketched=False, grad_scale=None, found_inf=None, **options):
    """Advance the refresh schedule of many matrices by one step, choosing anew each basis that is due.

    A matrix whose gradient is zero or not finite keeps its basis, or gets a seeded one if it has none, and stays due.

    Args:
        tensors: the state of one matrix after the other, as `keys` names it: the tensors of the basis, `countdown` (0-dim int64,
            on the host, so that a GPU is never asked: steps until the next refresh, COLD before the first; COLD - k waits k steps
            for the first sketch), and what else the parts read.
        gradients: (m, n) each; `sketched`: at the end of a step, sketches that give the basis of the next one, without elements
            for a matrix that is not due or got no gradient.
        numbers: integers of the state, one matrix after the other, `number_keys` names them.
        lr: 0-dim; with a host-side rate of 0 nothing is trained, and a refresh stays due (checkpoint loaders take such a step to
            create the state).
        kind, select, transport: names of KINDS, of lowrank_sys.subspace.select.SELECT and of transport.TRANSPORTS.
        moments, signed: names of the moments of R's shape, and whether each has a sign.
        hyper_keys, hyper: numbers of the group.
        left: the side of the bases.
        sums: name of the process group that has the other rows of all these matrices; "" for none. With one, `number_keys` names
            `offset`, the elements before the first row here, and `rows`, of the whole.
        grad_scale: one element, that gradients are to be multiplied by. found_inf: one element; where it is not zero, nothing is
            chosen from them.
    """
    call = Call(tensors, gradients, numbers, lr, sketched=sketched, grad_scale=grad_scale, found_inf=found_inf, **options)
    call.training = trains(lr)
    if not gradients:
        return
    waits = call.waits()
    near = [(i, wait) for i, wait in enumerate(waits) if wait <= 0]
    due = {i: call.due(i, wait) for i, wait in near if call.is_due(i, wait)}
    for i, wait in enumerate(waits) if sketched else near:  # whoever has a sketch, and whatever is due
        if i in due or (sketched and gradients[i].numel() > 0):
            call.kind.expect(due.get(i) or call.due(i, wait))
    if sketched and not call.training:
        return
    taken = {i for i, matrix in due.items() if call.kind.renew(matrix)}
    if not call.training:
        return
    call.kind.settle([due[i] for i in taken])
    for i, wait in near:
        if sketched and wait < COLD:
            call.countdowns[i].add_(2)  # with the common step below: one nearer to COLD
        elif i in taken:
            call.countdowns[i].fill_(call.kind.gap(due[i]))
        elif not sketched or is_due(wait):
            call.countdowns[i].fill_(wait + 1)
    count_down_(call.countdowns)


@fake(OP)
def _(tensors, gradients, numbers, lr, *, sketched=False, **options):
    call = Call(tensors, gradients, numbers, lr, sketched=sketched, **options)
    for i, gradient in enumerate(gradients):  # whether a matrix is due only its countdown knows
        if not sketched or gradient.numel() > 0:
            call.kind.expect(call.due(i, 0))


def expect_on_host(name, number):
    """`number` is a 0-dim int64 tensor on the CPU."""
    fits = number.dtype is torch.int64 and number.dim() == 0 and number.is_cpu
    expect(
        fits,
        OP,
        lambda: (
            f"{name} must be a 0-dim int64 tensor on the CPU, got shape {tuple(number.shape)}, {number.dtype} on {number.device}"
        ),
    )


def _expect_names(kind, select, transport):
    expect(kind in KINDS, OP, lambda: f"kind must be one of {', '.join(KINDS)}, got {kind}")
    names = KINDS[kind].selections()
    expect(not names or select in names, OP, lambda: f"select must be one of {', '.join(names)}, got {select}")
    expect(transport in TRANSPORTS, OP, lambda: f"transport must be one of {', '.join(TRANSPORTS)}, got {transport}")


def _expect_lists(tensors, gradients, numbers, keys, number_keys, moments, signed, hyper_keys, hyper):
    for name, got, names in (("tensors", tensors, keys), ("numbers", numbers, number_keys)):
        count, wanted = len(gradients), ", ".join(names)
        expect(
            len(got) == count * len(names), OP, lambda: f"{name} must have {wanted} for each of {count} gradients, got {len(got)}"
        )
    check_lists(OP, moments=moments, signed=signed)
    check_lists(OP, hyper_keys=hyper_keys, hyper=hyper)
    expect("countdown" in keys, OP, lambda: f"keys must name a countdown, got {', '.join(keys)}")


def expect_named(due, *names):
    """The state has these tensors and integers."""
    for name in names:
        expect(name in due.state, OP, lambda: f"keys or number_keys must name {name}, got {', '.join(due.state)}")


def expect_carried(due, shape, device):
    """The moments that are to be carried over, and the step, are R's: `shape`, in which None is any size."""
    if due.transport == "keep":
        return
    expect_named(due, *due.moments, "step")
    for name in due.moments:
        moment = due.state[name]
        fits = moment.dim() == 2 and all(want in (None, got) for want, got in zip(shape, moment.shape))
        expect(fits, OP, lambda: f"{name} must have shape {shape}, got {tuple(moment.shape)}")
        if is_coded(due.state, name):
            absmax = due.state[absmax_of(name)]
            expect_codes(OP, name, moment, absmax_of(name), absmax, moment.shape, device, by_row=True)
        else:
            expect_like(OP, name, moment, moment.shape, device)
            expect_dtype(OP, name, moment, torch.float32)
    expect_scalar(OP, "step", due.state["step"], device, own_device=True)
    expect_dtype(OP, "step", due.state["step"], torch.float32)


def is_due(wait):
    """Whether a step at this countdown ends with a refresh from its sketch."""
    return wait in (0, COLD)


def new_verdict(device):
    """{} on a CPU; else the `missed` of a state, where a GPU notes that a choice was none: 0-dim uint8, pinned on the host."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return {}
    return {"missed": torch.zeros((), dtype=torch.uint8, device="cpu", pin_memory=True)}


def is_taken(energies, state):
    """Whether a choice with these energies (r,), or norms, is one: there was a gradient, and it was finite.

    What is not taken stays due. A GPU is not asked, which would make the host wait: its choice counts as taken, and its verdict is
    copied to `missed` of the state, which a later step reads when it is there. Several processes wait for it: they must read it
    at the same step.
    """
    usable = ((energies > 0) & (energies < float("inf"))).any()
    if "missed" in state:
        state["missed"].copy_(~usable, non_blocking=not _together())
        return True
    return energies.device.type != "cpu" or bool(usable)


def _together():
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def trains(lr):
    """False for a host-side rate of 0: nothing is trained, and what is due stays due."""
    return lr.device.type != "cpu" or lr.item() != 0


def count_down_(countdowns):
    """One step less for each. By tensors: with a number, torch takes twice as long."""
    torch._foreach_sub_(countdowns, [countdowns[0].new_ones(())] * len(countdowns))
