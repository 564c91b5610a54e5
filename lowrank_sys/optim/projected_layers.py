"""What the next backward of projected layers is told, and what those share that read one input: a basis, its schedule, X B."""

import torch

from lowrank_sys.nn.projected_linear import Shared
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.refresh import COLD


def unite(optimizer, layers):
    """[[the weights of a family]], each with one basis and one schedule, as long as none of them has been chosen, and one X B if
    they have one basis.

    layers: {weight: its ProjectedLinear}.
    """
    families = {}
    for weight, layer in layers.items():
        if layer.projection.family is not None:
            families.setdefault((layer.projection.family, layer.rank, weight.dtype), []).append(weight)
    optimizer.make_states(layers)
    drawn = {weight for weight in layers if "row_scale" in optimizer.state[weight]}  # for each matrix by itself
    united = [weights for weights in families.values() if len(weights) > 1 and drawn.isdisjoint(weights)]
    for members in united:
        states, shared = [optimizer.state[weight] for weight in members], Shared(len(members))
        keys = store_of(states[0]).present(states[0])
        if all(state["countdown"] <= COLD for state in states):
            for state in states[1:]:
                state.update({key: states[0][key] for key in ("seed", "first_gap")})
                for key in ("countdown", *keys):
                    state[key].copy_(states[0][key])
        shared.together = all(
            torch.equal(state[key], states[0][key]) for state in states for key in ("countdown", *keys)
        )  # where they were trained apart, each keeps its own
        for weight in members:
            layers[weight].projection.shared = shared
    return united


def pool(families, layers, window):
    """Let the members of a family choose their next basis from all their sketches, of a lowrank_sys.optim.window.Window."""
    for members in families:
        on = layers[members[0]].projection
        present = [weight for weight in members if weight in window.sketches]
        sketches = [window.sketches[weight] for weight in present]
        sketches = [sketch for sketch in sketches if sketch is not None and sketch.total is not None]
        for one in (present, sketches):  # a schedule stands still without gradients: from then on they are apart
            on.shared.together &= len(one) in (0, len(members))
        if on.shared.together and sketches:
            total = torch.cat([sketch.total for sketch in sketches], dim=1 if on.left else 0)
            for sketch in sketches:
                sketch.total = total


def announce(optimizer, group, weight, layer, receive):
    """Tell a layer the basis that its weight's state has, and if the next one is due what to sketch for it: `receive(leaf)` then
    gets the sketch."""
    state, on = optimizer.state[weight], layer.projection
    store = store_of(state)
    on.left, on.rank = state["left"], store.rank(state)
    basis, omega = [state[key] for key in store.present(state)], optimizer.pipeline.directions(group, weight, state)
    if omega is None:
        on.serve(store, basis)
    else:
        on.serve(store, basis, omega, sketch_shape(weight, state, omega), receive)


def sketch_shape(weight, state, omega):
    """Of G Omega, or of Omegaᵀ G where the basis is on the right."""
    shape = (axis_of(weight.shape, state), omega.shape[1])
    return shape if state["left"] else shape[::-1]


def follow(optimizer, weight):
    """Put a state that was made before the model was moved where the weight is now."""
    state = optimizer.state[weight]
    if state["step"].device != weight.device:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = optimizer.pipeline.subspace.placed(key, value, weight.device)
