"""How a basis is chosen from a gradient, or from a sketch of it. `SELECT` is open: a method adds its own by name.

A selector takes a matrix that is due (lowrank_sys.subspace.refresh.Due) and returns (basis (d, r) fp32, energies (r,)); energies
of 0 say that the gradient was zero or not finite, and that the basis is not of it.
"""

import torch

from lowrank_sys.subspace.basis import store_of
from lowrank_sys.subspace.iteration import basis_from_sketch, project, seeded_basis, subspace_iteration, svd_basis
from lowrank_sys.subspace.shards import WHOLE, Part


class Selector(Part):
    """Base of the ways to choose a basis. What it returns for a shard may be of its process: the first one's is taken."""

    orthonormal = True  # whether its bases are, to rounding
    sized = False  # whether the size of the gradient matters, not its directions alone
    sketched = False  # whether a sketch of the gradient is enough
    moments = ()  # keys of the state that it reads: moments by name, "step"
    hyper = {}  # group keys that it reads, numbers, and their defaults
    counts = False  # whether it asks how many bases were chosen so far
    staggered = True  # whether the refreshes of a model's matrices are spread over the gap
    late = False  # whether the gradient of a step chooses, after it, the basis of the next; a first one is chosen before its step
    categories = {}  # {key of the state: its category in an account of memory} of what it keeps itself

    def init(self, state, param, group):
        """Add what it keeps to the state of a matrix (m, n), of which `left` is there."""

    def choose(self, due):
        raise NotImplementedError


class Randomized(Selector):
    """Randomized subspace iteration: from the old basis with two products with G, a first one with one.

    A first basis is refreshed within a gap, and the first step of a model needs one for every matrix at once.
    """

    sketched = sharded = True

    def choose(self, due):
        if due.sketched:
            return basis_from_sketch(due.shard.sum(due.gradient), due.old, left=due.left, seed=due.seed)
        return randomized_basis(due.gradient, due.old, rank=due.rank, left=due.left, seed=due.seed, shard=due.shard)


class Svd(Selector):
    """The exact singular vectors at steps 0, gap, 2 gap, ..., as the GaLore reference."""

    staggered, sharded = False, True

    def choose(self, due):
        return svd_basis(due.gradient, due.old, rank=due.rank, left=due.left, shard=due.shard)


class RandomOrthonormal(Selector):
    """Orthonormal columns from the seed and the number of the refresh, whatever the gradient is (FRUGAL, GoLore)."""

    sketched = counts = sharded = True

    def choose(self, due):
        d = len(due.old) if due.old is not None else due.raw.shape[0 if due.left else 1]
        size = due.shard.norms(torch.linalg.vector_norm(due.gradient.float()))
        new = seeded_basis(d, due.rank, due.seed + (int(due.state["refreshes"]) << 32), due.raw)
        energies = torch.where(size.isfinite(), size, 0).expand(due.rank)
        return new if due.old is None else torch.where(energies[0] > 0, new, due.old.to(new.dtype)), energies


def randomized_basis(grad, basis, *, rank, left, seed=0, shard=WHOLE):
    """(the next basis of G (m, n), its energies) by subspace iteration, from the old one or from none."""
    n_iter = 0 if basis is None else 1
    if shard.group:
        return subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, seed=seed, project=project, shard=shard)
    return torch.ops.lowrank.subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, seed=seed)


SELECT = {"randomized": Randomized(), "svd": Svd(), "random": RandomOrthonormal()}


def gram_of(state, d, group):
    """BᵀB (r, r) fp32 of a state's basis (d, r); None where its store and its selector say that it is I."""
    store, selector = store_of(state), SELECT.get(group.get("subspace"))
    if store.orthonormal and (selector is None or selector.orthonormal):
        return None
    basis = store.load(state, d).float()
    return basis.T @ basis
