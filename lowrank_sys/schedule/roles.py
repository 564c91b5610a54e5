"""What a parameter is for a while, and which layer it belongs to."""

from typing import NamedTuple


class Role(NamedTuple):
    """name: 'trained', as its group says; 'whole', trained without a basis in a group that has a rank; 'frozen', without a gradient
    and without a state. share: with what probability it was drawn for this, or None."""

    name: str
    share: float | None = None

    @property
    def trains(self):
        return self.name != "frozen"


TRAINED, WHOLE, FROZEN = Role("trained"), Role("whole"), Role("frozen")


def layer_of(name):
    """The layer of a parameter by its name: up to the first number ('model.layers.3'), else its module, else itself."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name
