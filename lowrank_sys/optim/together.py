"""Which parts go together: one that makes no sense beside another is refused, with both of their names."""

from lowrank_sys.nn.quant_weight import is_quantized
from lowrank_sys.optim.remainder import Remainder


def check_together(pipeline, group):
    """Raise a ValueError for parts of a pipeline which do not go together in a low-rank group."""
    for found in (_transport, _late, _state, _basis, _update, _roles, _keys, _merged):
        found(pipeline, group)


def _name(part):
    return type(part).__name__


def _transport(pipeline, group):
    names = pipeline.rule.transports
    if group.get("moments", "keep") not in names:
        raise ValueError(f"moments must be one of {', '.join(names)} for {_name(pipeline.rule)}, got {group['moments']!r}")


def _late(pipeline, group):
    if pipeline.remainder.feeds_back and pipeline.subspace.late(group):
        raise ValueError(
            f"subspace must choose before the step for {_name(pipeline.remainder)}, whose error takes the gradient's place, "
            f"got {group['subspace']!r}"
        )


def _state(pipeline, group):
    """What a selector, a transport or a remainder reads of a state is kept there by some part."""
    rule, subspace, remainder = pipeline.rule, pipeline.subspace, pipeline.remainder
    kept = {"step", *subspace.categories, *remainder.categories, *rule.moments((1, 1), group)}
    for key, names in subspace.needs(group).items():
        if missing := [name for name in names if name not in kept]:
            raise ValueError(
                f"{key}={group[key]!r} needs {', '.join(missing)} in the state, which {_name(rule)}, {_name(subspace)} and "
                f"{_name(remainder)} do not keep"
            )
    if both := sorted(rule.moments((1, 1), group).keys() & remainder.categories.keys()):
        raise ValueError(f"{_name(rule)} and {_name(remainder)} both keep {', '.join(both)} in the state")
    if missing := [key for key in remainder.needs if key not in subspace.categories]:
        raise ValueError(f"{_name(remainder)} needs {', '.join(missing)} in the state, which {_name(subspace)} does not keep")
    if subspace.for_remainder and not remainder.needs:
        raise ValueError(f"{_name(subspace)} keeps what a remainder has to read, and {_name(remainder)} does not")


def _basis(pipeline, group):
    remainder, subspace = pipeline.remainder, pipeline.subspace
    if remainder.basis is True and not subspace.has_basis(group):
        raise ValueError(f"{_name(remainder)} needs a basis, {_name(subspace)} has none")
    if remainder.basis is True and not subspace.fusable:
        raise ValueError(f"{_name(remainder)} takes R for project(G), which that of {_name(subspace)} is not")
    if subspace.empties and not remainder.alone:
        raise ValueError(f"{_name(remainder)} does nothing for a matrix that {_name(subspace)} leaves out of R")
    if remainder.basis is False and subspace.has_basis(group):
        raise ValueError(f"{_name(remainder)} takes whole gradients, {_name(subspace)} has a basis")


def _update(pipeline, group):
    if not pipeline.remainder.reads_update and not pipeline.rule.returns_gradient(group):
        raise ValueError(f"{_name(pipeline.remainder)} makes its update of the gradient alone, not of {_name(pipeline.rule)}'s")


def _roles(pipeline, group):
    remainder = pipeline.remainder
    if pipeline.schedule.makes_whole and remainder.needs:
        raise ValueError(
            f"{_name(pipeline.schedule)} lets matrices train whole, without what {_name(remainder)} needs in the state"
        )


def _keys(pipeline, group):
    """Group keys that a remainder or a schedule reads of others are there."""
    others = f"{_name(pipeline.rule)} with {_name(pipeline.subspace)}"
    for part in (pipeline.remainder, pipeline.schedule):
        if missing := [key for key in part.reads if key not in group]:
            raise ValueError(f"{_name(part)} reads {', '.join(missing)} of a group, which {others} does not have")


def _merged(pipeline, group):
    """The low-rank part of a quantized weight, which is merged later, takes back(X) alone."""
    if "compensation" not in pipeline.subspace.defaults or not any(map(is_quantized, group["params"])):
        return
    remainder, schedule = pipeline.remainder, pipeline.schedule
    for part, fits in ((remainder, type(remainder) is Remainder), (schedule, not schedule.makes_whole)):
        if not fits:
            raise ValueError(
                f"{_name(part)} changes more of a quantized weight than the part that {_name(pipeline.subspace)} merges"
            )
