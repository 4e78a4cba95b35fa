"""What a decoder keeps of the tokens that it has seen, so that each next token costs one row."""

from __future__ import annotations

from dataclasses import dataclass

from peftarray.arrays import Array, namespace

__all__ = ["Cache", "Pair", "extended"]

Pair = tuple[Array, Array]
"""The keys and values of a layer, each `(batch, groups, length, width)`."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of every layer. A value: to go on gives a new one, so a text may go on in several ways.

    Attributes:
        layers: of each layer, empty before the first token.

    Example:
        >>> Cache().length
        0
    """

    layers: tuple[Pair, ...] = ()

    @property
    def length(self) -> int:
        """How many tokens it has seen."""
        return self.layers[0][0].shape[2] if self.layers else 0


def extended(before: Pair | None, keys: Array, values: Array) -> Pair:
    """Keys and values with those of earlier tokens in front of them."""
    if before is None:
        return keys, values
    xp = namespace(before[0], keys)
    return xp.concat([before[0], keys], axis=2), xp.concat([before[1], values], axis=2)
