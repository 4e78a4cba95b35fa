"""What a gradient may be asked of: the same rules, and the same words, for every library's differentiation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from peftarray import trees
from peftarray.arrays import Array, namespace
from peftarray.errors import PeftError, nearest

__all__ = ["Chosen", "check_loss", "refuse_independent", "refuse_unused"]


class Chosen:
    """The arrays of a tree that gradients are asked for.

    Attributes:
        tree: the whole tree.
        names: of all its leaves, in order.
        values: its leaves.
        places: of the chosen ones among them.

    Args:
        tree: arrays in nested dicts, lists and tuples.
        frozen: names of arrays or of branches to leave out. A leaf that is None is left out as well.

    Raises:
        PeftError: a frozen name is not there, nothing is left, or what is left is no array of floating-point numbers.
    """

    def __init__(self, tree: Any, frozen: Collection[str]) -> None:
        self.tree = tree
        pairs = list(trees.named(tree))
        # NumPy's arithmetic makes scalars of arrays without axes.
        pairs = [(name, np.asarray(value) if isinstance(value, np.generic) else value) for name, value in pairs]
        self.names = [name for name, _ in pairs]
        self.values = [value for _, value in pairs]
        branches = [name + "." for name in frozen]
        for name, branch in zip(frozen, branches, strict=True):
            if not any(other == name or other.startswith(branch) for other in self.names):
                message = f"frozen names {name}, which params does not have{nearest(name, self.names)}"
                raise PeftError(message)
        self.places = [
            place
            for place, (name, value) in enumerate(pairs)
            if value is not None and name not in frozen and not name.startswith(tuple(branches))
        ]
        if not self.places:
            message = "params holds no array that gets a gradient; give at least one that is not frozen"
            raise PeftError(message)
        for place in self.places:
            _check_array(*pairs[place])

    @property
    def arrays(self) -> list[Array]:
        """The chosen ones."""
        return [self.values[place] for place in self.places]

    def filled(self, arrays: Sequence[Array]) -> Any:
        """The tree with others in place of the chosen ones."""
        new = list(self.values)
        for place, array in zip(self.places, arrays, strict=True):
            new[place] = array
        return trees.refill(self.tree, new)

    def gradients(self, arrays: Sequence[Array]) -> Any:
        """A tree of the same form that has these in the chosen places, and None in the others."""
        new: list[Array | None] = [None] * len(self.values)
        for place, array in zip(self.places, arrays, strict=True):
            new[place] = array
        return trees.refill(self.tree, new)


def check_loss(loss: Any) -> None:
    """Refuse a loss that is not one real number of a library."""
    if not hasattr(loss, "dtype"):
        refuse_independent(loss)
    if loss.shape != ():
        message = f"the loss has shape {tuple(loss.shape)}; it must be one number, so take its sum or mean"
        raise PeftError(message)
    if not namespace(loss).isdtype(loss.dtype, "real floating"):
        message = f"the loss is {loss.dtype}; it must be a real number, so take its absolute value or real part"
        raise PeftError(message)


def refuse_independent(loss: Any) -> None:
    """Refuse a loss that no gradient reaches any array from."""
    message = f"the loss is a {type(loss).__name__} that does not depend on params; compute it from them"
    raise PeftError(message)


def refuse_unused(names: Collection[str]) -> None:
    """Refuse arrays that the loss does not depend on."""
    if names:
        message = (
            f"the loss does not depend on {', '.join(names)}; use them, name them in frozen, or pass unused='zero'"
        )
        raise PeftError(message)


def _check_array(name: str, value: Any) -> None:
    if not hasattr(value, "dtype"):
        message = f"{name} is a {type(value).__name__}; params holds arrays, so make it one or pass it beside params"
        raise PeftError(message)
    if not namespace(value).isdtype(value.dtype, ("real floating", "complex floating")):
        message = f"{name} is {value.dtype}, which has no gradient; name it in frozen or pass it beside params"
        raise PeftError(message)
