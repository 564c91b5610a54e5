"""A subspace with an orthonormal basis in memory, chosen by a selector, kept as it is or in INT4."""

import torch

from lowrank_sys._ops.rules import expect, expect_dtype, expect_matrix
from lowrank_sys.subspace import gap as adaptive
from lowrank_sys.subspace.basis import DENSE, Int4, axis_of, load, store_of
from lowrank_sys.subspace.iteration import seeded_basis, sketch_directions
from lowrank_sys.subspace.kind import Kind
from lowrank_sys.subspace.refresh import COLD, OP, expect_carried, expect_named, expect_on_host, is_due, is_taken, new_verdict
from lowrank_sys.subspace.select import SELECT
from lowrank_sys.subspace.shards import shard_of
from lowrank_sys.subspace.transport import TRANSPORTS


class Orthonormal(Kind):
    """Group keys: `rank`, `update_proj_gap` (steps between refreshes), `proj_type` (SIDES), `subspace` (a name of SELECT:
    'randomized' subspace iteration, staggered over matrices; exact 'svd' at steps 0, gap, 2 gap, ... as the GaLore reference),
    `moments` at a refresh (a name of TRANSPORTS: 'keep' | 'reset' | 'rotate'), `seed`; `refresh`: with 'now' a basis that is due is
    chosen from the step's gradient before the step uses it, with 'next' a sketch of the step's gradient, linear in it, gives the
    basis of the next step, and training starts on seeded orthonormal bases. 'next' lets micro-batches add up exactly.
    `refresh_every` (1): of so many steps one refreshes, all that is due since the last; a gap is rounded up to a multiple of it.

    `quant` keeps the basis in INT4 (`quant_n_bit` = 4) in groups of `quant_group_size` entries of a vector. With a
    `cos_threshold` the gap of each matrix is its own: it starts as `update_proj_gap` and is multiplied by `gamma_proj`, up to
    `max_update_proj_gap` (None: 16 update_proj_gap), at every refresh whose subspace and the `queue_size` - 1 before it overlap
    with their predecessors by cos_threshold or more in the mean (Q-GaLore, lowrank_sys.subspace.gap). Two random subspaces
    overlap by r/d. This rule reads the overlaps: with a GPU, the host waits in a step that refreshes, and in no other.

    `int8_gemm` quantises the operands of the step's two products to INT8 on the fly (docs/kernels/int8-products.md); a basis is
    chosen in fp32 all the same.

    State of a matrix: `basis` (m or n, r) in the parameter's dtype, or packed with `basis_scale`, `basis_offset` and
    `group_size`; `left`; `countdown`, steps until the next refresh, on the host; `first_gap` and `seed`; with a cos_threshold
    `gap`, on the host, and `overlaps`, the queue; with a selector that counts `refreshes`, on the host.
    """

    defaults = {
        **Kind.defaults,
        "subspace": "randomized",
        "quant": False,
        "quant_n_bit": 4,
        "quant_group_size": 256,
        "cos_threshold": None,
        "gamma_proj": 2,
        "queue_size": 5,
        "max_update_proj_gap": None,
        "int8_gemm": False,
    }
    categories = {
        **DENSE.categories,
        **Int4.categories,
        **dict.fromkeys(("countdown", "missed", "gap", "overlaps", "refreshes"), "counters"),
    }
    on_host = (*Kind.on_host, "missed", "gap", "refreshes")
    hyper = (*Kind.hyper, "cos_threshold", "gamma_proj", "max_update_proj_gap")
    sketched = sharded = True

    def selections(self):
        return tuple(SELECT)

    def check(self, group, names):
        super().check(group, names)
        if group["refresh"] == "next" and not SELECT[group["subspace"]].sketched:
            able = ", ".join(name for name, selector in SELECT.items() if selector.sketched)
            raise ValueError(f"subspace must be {able} with refresh='next', got {group['subspace']!r}")
        if group["quant"] and group["quant_n_bit"] != 4:
            raise ValueError(f"quant_n_bit must be 4, got {group['quant_n_bit']!r}")
        size = group["quant_group_size"]
        if group["quant"] and not (isinstance(size, int) and 32 <= size <= 1024 and size & (size - 1) == 0):
            raise ValueError(f"quant_group_size must be a power of two from 32 to 1024, got {size!r}")
        most = group["max_update_proj_gap"]
        if group["cos_threshold"] is not None and most is not None and most < group["update_proj_gap"]:
            raise ValueError(
                f"max_update_proj_gap must be an integer of at least update_proj_gap = {group['update_proj_gap']}, got {most!r}"
            )
        if group["int8_gemm"] and group["quant"]:
            raise ValueError("int8_gemm must be False with quant: a basis in INT4 has products of its own")

    def check_sharded(self, group):
        super().check_sharded(group)
        if not SELECT[group["subspace"]].sharded:
            able = ", ".join(name for name, selector in SELECT.items() if selector.sharded)
            why = SELECT[group["subspace"]].unsharded
            raise ValueError(f"subspace must be one of {able} for sharded weights, got {group['subspace']!r}: {why}")

    def init(self, state, param, group, index, count):
        rank, gap, selector = group["rank"], group["update_proj_gap"], SELECT[group["subspace"]]
        state["left"], shape = self.low_rank_shape(group, param)
        d, store = axis_of(param.shape, state), Int4(group["quant_group_size"]) if group["quant"] else DENSE
        state.update(zip(store.keys, store.make(d, rank, param)))
        state.update(store.options)
        state["countdown"] = torch.tensor(COLD, device="cpu")
        state.update(new_verdict(param.device))
        if group["refresh"] == "next":
            store.write(state, seeded_basis(d, rank, group["seed"] + index, param))
            state["countdown"] -= self.first_wait(group, index, count)
        state["first_gap"] = index * gap // count + 1 if selector.staggered else gap + selector.late  # late: not in its step
        state["seed"] = group["seed"] + index
        selector.init(state, param, group)
        if selector.counts:
            state["refreshes"] = torch.tensor(0, device="cpu")
        if group["cos_threshold"] is not None:
            state["gap"] = torch.tensor(gap, device="cpu")
            state["overlaps"] = adaptive.new_overlaps(group["queue_size"], param.device)
        return shape

    def sketch_directions(self, param, state, warm):
        if not is_due(int(state["countdown"])):
            return None
        left = state["left"]
        if warm is not None and tuple(warm.shape) != self.shape_of(param, state):
            warm = None
        basis = load(state, param).to(param.dtype)
        other, shard = param.shape[1 if left else 0], shard_of(state, param.shape[1])
        if shard.group:
            return sketch_directions(basis, warm, other=other, left=left, seed=state["seed"], shard=shard)
        return torch.ops.lowrank.sketch_directions(basis, warm, other=other, left=left, seed=state["seed"])

    def more_defaults(self, group):
        return next((dict(selector.hyper) for name, selector in SELECT.items() if name == group["subspace"]), {})

    def needs(self, group):
        return {"subspace": SELECT[group["subspace"]].moments, **super().needs(group)}

    def reads(self, group):
        selector = SELECT[group["subspace"]]
        return (*selector.moments, *selector.categories)

    def late(self, group):
        return SELECT[group["subspace"]].late

    def hyper_of(self, group):
        return (*self.hyper, *SELECT[group["subspace"]].hyper)

    def expect(self, due):
        matrix, store, state = due.raw, store_of(due.state), due.state
        expect_named(due, *(DENSE if store is None else store).keys, "seed", "first_gap", *(["overlaps"] if "gap" in state else []))
        expect_matrix(OP, "sketch" if due.sketched else "gradient", matrix)
        d = axis_of(matrix.shape, state)
        store.expect(OP, state, d, matrix.device)
        due.rank = rank = store.rank(state)
        other = matrix.shape[1 if due.left else 0]
        most = other if due.sketched else min(d, due.shard.rows or other)
        expect(rank <= most, OP, lambda: f"rank must be at most {most}, got {rank}")
        if due.sketched:
            expect_dtype(OP, "sketch", matrix, torch.float32)
            other = None
        expect_carried(due, (rank, other) if due.left else (other, rank), matrix.device)
        if "gap" in state:
            expect_on_host("gap", state["gap"])
            queue = state["overlaps"]
            rule = "gamma_proj" in due.h or "cos_threshold" not in due.h
            expect(rule, OP, lambda: f"hyper_keys must name gamma_proj, got {', '.join(due.h)}")
            fits = queue.dim() == 1 and queue.dtype == torch.float32
            expect(fits, OP, lambda: f"overlaps must be a vector of float32, got shape {tuple(queue.shape)}, {queue.dtype}")
        due.sized = SELECT[due.select].sized

    def renew(self, due):
        store, d = store_of(due.state), axis_of(due.raw.shape, due.state)
        if due.sketched or not due.first:
            due.old = store.load(due.state, d)
        new, energies = SELECT[due.select].choose(due)
        new = due.shard.share(new)
        taken, old, due.old = is_taken(energies, due.state), due.old, None
        if old is None:
            store.write(due.state, new)
        elif taken:
            kept = (old == new).all()
            self._compare(due, old, new, kept)
            transport = TRANSPORTS[due.transport]
            if not transport.bases:
                old = None
            elif store is DENSE:
                old = old.clone()
            store.write(due.state, new, kept)
            transport.carry(due, old, store.load(due.state, d) if transport.bases else None, kept)
        if "refreshes" in due.state and due.training:
            due.state["refreshes"] += taken
        return taken

    def _adapts(self, due):
        """Whether a matrix has a gap of its own, and its group still asks for one."""
        return "gap" in due.state and "cos_threshold" in due.h

    def _compare(self, due, old, new, kept):
        """Remember how much of its subspace a matrix keeps, if its gap is its own."""
        if self._adapts(due) and due.training and not due.first:
            due.mean = adaptive.push_(due.state["overlaps"], due.shard.share(adaptive.overlap(old, new)), kept)

    def settle(self, taken):
        grown = [due for due in taken if due.mean is not None]
        if grown:
            h = grown[0].h
            most = h.get("max_update_proj_gap", 16 * h["update_proj_gap"])
            adaptive.grow_(
                [due.state["gap"] for due in grown], [due.mean for due in grown], h["cos_threshold"], h["gamma_proj"], int(most)
            )

    def gap(self, due):
        return self.aligned(due, due.state["gap"].item()) if self._adapts(due) and not due.first else super().gap(due)

    def describe(self, state):
        """Where a gap is its own: also "gap", and the "overlaps"."""
        if "gap" not in state:
            return super().describe(state)
        overlaps = [value for value in state["overlaps"].tolist() if value == value]
        return {"gap": int(state["gap"]), **super().describe(state), "overlaps": overlaps}
