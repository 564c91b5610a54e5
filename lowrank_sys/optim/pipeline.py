"""The route of a step: gradient -> refresh -> project -> rule -> apply. The only place that knows it.

A batch goes through a fused op where the table of lowrank_sys.optim.fused has one, and through `_general` for any other
combination of parts: what the fused ops are held against.
"""

from math import prod

import torch

from lowrank_sys._ops.numerics import usable
from lowrank_sys.optim import fused
from lowrank_sys.optim.moments import Fp32, Opened, first_of, refreshed
from lowrank_sys.optim.remainder import WHOLE, Remainder
from lowrank_sys.optim.sums import take_together
from lowrank_sys.optim.update import Change
from lowrank_sys.optim.weight import Rows, weight_store
from lowrank_sys.schedule.roles import TRAINED
from lowrank_sys.schedule.schedule import Schedule
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.moments import absmax_of
from lowrank_sys.subspace.orthonormal import Orthonormal
from lowrank_sys.subspace.refresh import COLD
from lowrank_sys.subspace.select import SELECT
from lowrank_sys.subspace.shards import shard_of


class Batch:
    """Parameters of one group that take a step together: of one device, side, weight store, basis store and kind of moments.

    gradients: G each, or R with `projected`. states: of the optimizer. rule, remainder: that serve them. guards: grad_scale,
    found_inf and skipped of the ops.
    """

    def __init__(self, group, rule, remainder, params, gradients, states, guards, projected=False):
        self.group, self.rule, self.remainder = group, rule, remainder
        self.params, self.gradients, self.states, self.guards = params, gradients, states, guards
        self.projected = projected
        self.sketches = None
        self.usable = [None] * len(params)  # which channels of the gradients may be used, None for all

    @property
    def scale(self):
        """What gradients are multiplied by, 0-dim, or None."""
        scale = self.guards["grad_scale"]
        return None if scale is None else scale.reshape(())

    @property
    def go(self):
        """Whether the step is one, 0-dim bool; None if it is."""
        found_inf = self.guards["found_inf"]
        return None if found_inf is None else found_inf.reshape(()) == 0

    def with_gradients(self, gradients, projected, **guards):
        """The same parameters with other gradients, and other guards."""
        return Batch(
            self.group, self.rule, self.remainder, self.params, gradients, self.states, {**self.guards, **guards}, projected
        )

    def part(self, chosen):
        """A batch of those whose state is `chosen`."""
        kept = [i for i, state in enumerate(self.states) if chosen(state)]
        lists = ([column[i] for i in kept] for column in (self.params, self.gradients, self.states))
        return Batch(self.group, self.rule, self.remainder, *lists, self.guards, self.projected)

    def one_by_one(self, of):
        """Yield a batch for each parameter, its gradient through `of` first."""
        for param, gradient, state in zip(self.params, self.gradients, self.states):
            one = of(gradient)
            yield Batch(self.group, self.rule, self.remainder, [param], [one], [state], self.guards, self.projected)

    @property
    def left(self):
        return self.states[0].get("left", False)

    @property
    def store(self):
        """The store of the weights."""
        return weight_store(self.params[0], self.group)

    @property
    def has_subspace(self):
        return store_of(self.states[0]) is not None

    def column(self, key):
        return [state[key] for state in self.states]


class Pipeline:
    """The parts of a method, and the route of a step through them.

    Args:
        rule: lowrank_sys.optim.rules, of the matrices in a group with a rank.
        plain: the rule of all other parameters; the rule's own choice by default.
        subspace: a kind of lowrank_sys.subspace; an orthonormal basis in memory by default.
        remainder: lowrank_sys.optim.remainder; dropped by default, as in GaLore.
        moments: how moments are kept (lowrank_sys.optim.moments); fp32 by default.
        schedule: which parameters train now, and as what (lowrank_sys.schedule); all of them always by default.
    """

    def __init__(self, rule, *, plain=None, subspace=None, remainder=None, moments=None, schedule=None):
        self.rule = rule
        self.plain = rule.plain if plain is None else plain
        self.subspace = Orthonormal() if subspace is None else subspace
        self.remainder = Remainder() if remainder is None else remainder
        self.moments = Fp32() if moments is None else moments
        self.schedule = Schedule() if schedule is None else schedule

    def categories(self):
        """{key of a state: its category in an account of memory}."""
        names = {name for rule in (self.rule, self.plain) for name in rule.names}
        parts = (self.subspace, self.remainder, self.moments, self.schedule, *SELECT.values())
        kinds = {key: kind for part in parts for key, kind in part.categories.items()}
        return {**kinds, **dict.fromkeys(names, "moments")}

    @property
    def from_low_rank(self):
        """Whether a step needs nothing of G but R, and the next basis nothing but a sketch."""
        return self.remainder.from_low_rank and self.subspace.sketched and self.schedule.static

    @property
    def serves_int8_gemm(self):
        return (self.rule.name, self.remainder.name, self.moments.name) == ("adam", "none", "fp32")

    def rule_of(self, group):
        return self.rule if "rank" in group else self.plain

    def remainder_of(self, group, state=None):
        """state: of a matrix that may have no basis."""
        if "rank" not in group:
            return WHOLE
        return self.remainder.whole if state is not None and self.subspace.is_whole(state) else self.remainder

    def moments_of(self, group, shape):
        """{name: Moment} of a gradient of this shape."""
        return self.rule_of(group).moments(tuple(shape), group)

    def defaults(self):
        """Of the group keys of its parts that are no low-rank group's alone."""
        return {"weight_decay": 0.0, **self.plain.defaults, **self.rule.defaults, **self.schedule.defaults}

    def check_sharded(self, group):
        """Raise a ValueError where a part does not serve weights whose rows lie on several processes."""
        parts = [self.rule_of(group), self.remainder if "rank" in group else WHOLE]
        if "rank" in group:
            self.subspace.check_sharded(group)
        for part in parts:
            if not part.sharded:
                raise ValueError(f"{type(part).__name__} does not serve sharded weights: {part.unsharded}")
        if not self.schedule.static:
            why = "fully_shard does not know of layers that are drawn, or frozen and thawed, in mid-run"
            raise ValueError(f"{type(self.schedule).__name__} does not serve sharded weights: {why}")

    def by_row(self, group, shape):
        """{name: whether it is kept flat} of what a state has for each row of a weight of this shape, if it is sharded."""
        low_rank = "rank" in group
        moments = self.moments_of(group, (1, 1) if low_rank else shape)
        names = [name for name, moment in moments.items() if moment.axis != 1]
        flat = not low_rank and len(shape) > 1
        return {
            **dict.fromkeys((*names, *(self.remainder if low_rank else WHOLE).by_row), False),
            **{absmax_of(name): flat for name in names},
        }

    def new_state(self, param, group, index, count, role=TRAINED, shard=()):
        """The state before the first step of weight number `index`; of `count` matrices in groups with a rank. Of a frozen one
        nothing. shard: what it has besides where these are some rows of the weight (lowrank_sys.subspace.shards.KEYS)."""
        if not role.trains:
            return {}
        state, shape = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}, param.shape
        if "rank" in group:
            shape = self.subspace.begin(state, param, group, index, count, role)
            (self.remainder.whole if self.subspace.is_whole(state) else self.remainder).init(state, param)
            self.schedule.init(state, param)
        weight_store(param, group).init(state, index)
        self.moments.init(state, self.moments_of(group, shape), tuple(shape), param, group, rows=dict(shard).get("rows"))
        state.update(shard)
        return state

    def batches(self, group, triples, guards_on, projected=False):
        """Yield a Batch of what can go together of `triples` (parameter, gradient, state)."""
        kinds = {}
        for param, gradient, state in triples:
            store = weight_store(param, group)
            kind = (param.device, store.group_size, state.get("left"), state.get("group_size"), state.get("sums"), *state)
            lists = kinds.get(kind)
            if lists is None:
                lists = kinds[kind] = ([], [], [])
            lists[0].append(param)
            lists[1].append(gradient.contiguous())
            lists[2].append(state)
        rule = self.rule_of(group)
        for (device, *_), lists in kinds.items():
            yield Batch(
                group, rule, self.remainder_of(group, lists[2][0]), *lists, guards_on(device), projected and "rank" in group
            )

    # The stations of a step.

    def choose(self, batch, lr):
        """Choose the bases that the step uses, with refresh='now'; with 'next' take the sketches of those after it."""
        if not self.schedule.static and "rank" in batch.group:
            for gradient, state in zip(batch.gradients, batch.states):
                self.schedule.watch(gradient, state, batch.scale, batch.group)
        self._before(batch)
        if not batch.has_subspace:
            return
        if batch.group["refresh"] == "now":
            late = self.subspace.late(batch.group)
            early = batch.part(lambda state: int(state["countdown"]) <= COLD) if late else batch
            if early.params:
                self._advance(early, early.gradients, lr)
            return
        omegas = [self.directions(batch.group, p, s) for p, s in zip(batch.params, batch.states)]
        batch.sketches = [
            None if omega is None else self.subspace.sketch(g, omega, batch.left) for g, omega in zip(batch.gradients, omegas)
        ]

    def _before(self, batch):
        """Let the remainder put its own gradients in place of what came."""
        if batch.projected or not batch.remainder.feeds_back:
            return
        scale, go = batch.scale, batch.go
        taken = [batch.remainder.before(g, s, scale, go) for g, s in zip(batch.gradients, batch.states)]
        batch.gradients, batch.usable = map(list, zip(*taken))
        batch.guards = {**batch.guards, "grad_scale": None}

    def directions(self, group, param, state):
        """Omega of the sketch that this step's gradient of `param` owes the next basis, or None."""
        warm = first_of(state, self.moments_of(group, self.subspace.shape_of(param, state)))
        return self.subspace.sketch_directions(param, state, warm)

    def renew(self, batch, lr):
        """Choose the bases of the next step: with refresh='next' from the sketches, those of a late selector from the gradients."""
        if batch.has_subspace and batch.group["refresh"] == "now" and self.subspace.late(batch.group):
            self._advance(batch, batch.gradients, lr)
        if batch.sketches is not None:
            self._advance(batch, batch.sketches, lr, sketched=True)

    def _advance(self, batch, gradients, lr, sketched=False):
        low_rank = self.subspace.shape_of(batch.params[0], batch.states[0])
        moments = refreshed(self.moments_of(batch.group, low_rank))
        guards = {"grad_scale": batch.guards["grad_scale"], "found_inf": batch.guards["found_inf"]}
        cold = batch.part(lambda state: int(state["countdown"]) <= COLD) if batch.remainder.begins else None
        self.subspace.advance(batch.group, gradients, batch.states, lr, batch.left, moments, sketched=sketched, **guards)
        for g, state in zip(cold.gradients, cold.states) if batch.remainder.begins else ():
            if int(state["countdown"]) > COLD:
                batch.remainder.begin(g, state)

    def update(self, batch, lr):
        """Step the weights, on the bases that are there. A fused step reads no value on the host and makes nothing that stays, so
        that a CUDA graph can hold it."""
        step = fused.fused(batch) if self.subspace.fusable else None
        if step is not None:
            fused.run(step, batch, lr)
            return
        columns = zip(batch.params, batch.gradients, batch.states, batch.usable)
        with torch.autocast(batch.params[0].device.type, enabled=False):
            take_together(_general(self, batch, *column, lr) for column in columns)

    def step(self, batch, lr):
        """The whole step of a batch from its gradients."""
        self.choose(batch, lr)
        self.update(batch, lr)
        self.renew(batch, lr)


def _general(method, batch, param, g, state, usable_channels, lr):
    """The step of one weight by the parts alone. g: G, or R if the batch is projected. Of rows it yields once, for its sums."""
    group, rule, remainder, store = batch.group, batch.rule, batch.remainder, batch.store
    go, skipped, has_basis = batch.go, batch.guards["skipped"], store_of(state) is not None
    axis = (0 if batch.left else 1) if has_basis else None  # along which a channel runs
    whole = rule.returns_gradient(group) and not has_basis  # then nothing of the weight's size is made
    state["step"] += 1 if go is None else go
    s = Opened(state, method.moments_of(group, param.shape if not has_basis else method.subspace.shape_of(param, state)))
    s.grad_scale, s.d = batch.scale, axis_of(param.shape, state) if has_basis else None
    s.shard = shard = shard_of(state, prod(param.shape[1:]))
    s.weight_rms, s.weight = lambda: store.rms(param, shard), Rows(store, param)
    if whole:
        r, s.ok = g, torch.ones((), dtype=torch.bool, device=param.device)
    else:
        r = method.subspace.project(group, g, state) if has_basis and not batch.projected else g.float()
        r = r if s.grad_scale is None else r * s.grad_scale
        s.ok = usable(r) if axis is None else usable(r).all(axis, keepdim=True)
    for mask in (usable_channels, remainder.measure(g, r, s, state, group)):
        s.ok = s.ok if mask is None else s.ok & mask
    if skipped is not None:
        out = (~s.ok).sum() * (param.numel() // max(1, s.ok.numel()))
        skipped += out if go is None else out * go
    s.ok = s.ok if go is None else s.ok & go
    r = r if whole else torch.where(s.ok, r, 0)
    s.rate, rate = rule.rates(lr, s, group)
    x = r if whole else torch.where(s.ok, rule.update(r, s, group), 0)
    s.sums = remainder.partial(r, x, s, state, group)
    if s.sums is not None and shard.group:
        s.sums = yield shard, s.sums, r.shape[1] * shard.rows
    update = remainder.of(None if batch.projected else g, r, x, s, state, group)
    s.close()
    decay = 1 - s.rate * group["weight_decay"] if group["weight_decay"] != 0 else None
    change = Change(update, rate, state, param.shape, group.get("int8_gemm", False))
    store.apply(param, state, change, decay=decay, ok=s.ok, seed=group.get("seed", 0))
    remainder.after(g, r, state)
