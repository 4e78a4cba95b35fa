"""Where a training's batches come from, and how it goes on in the midst of them after a stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from peftarray import random, trees
from peftarray.arrays import integers, namespace
from peftarray.errors import ConfigError

__all__ = ["Batches", "Position", "Source", "groups", "length"]

Source = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches that can be gone through again, or a function from the number of an epoch to its batches."""


class Position(NamedTuple):
    """How many batches of which epoch are done."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Batches:
    """Rows of arrays, a batch at a time: in their order, or in one that the seed and the epoch decide.

    Attributes:
        arrays: a tree of arrays whose first axes are equally long.
        size: rows of a batch.
        seed: of the order; None keeps the rows as they lie.
        drop_last: leave out a last batch that is smaller.

    Example:
        >>> batches = Batches({"x": np.arange(5)}, 2)
        >>> [batch["x"].tolist() for batch in batches], len(batches)
        ([[0, 1], [2, 3], [4]], 3)
    """

    arrays: Any
    size: int
    seed: int | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        lengths = sorted({leaf.shape[0] for leaf in trees.leaves(self.arrays)})
        if len(lengths) != 1:
            message = f"the arrays of Batches have {lengths} rows; they must have equally many"
            raise ConfigError(message)
        most = lengths[0] if self.drop_last else math.inf
        if type(self.size) is not int or not 1 <= self.size <= most:
            message = f"Batches.size is {self.size!r} for {lengths[0]} rows; it must be a whole number of at least 1"
            raise ConfigError(message + (" and at most the rows, as drop_last is True" if self.drop_last else ""))

    @property
    def rows(self) -> int:
        """Of the arrays."""
        return trees.leaves(self.arrays)[0].shape[0]

    def __len__(self) -> int:
        return self.rows // self.size if self.drop_last else -(-self.rows // self.size)

    def __iter__(self) -> Iterator[Any]:
        return self(0)

    def __call__(self, epoch: int, *, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from number `start` on."""
        order, leaves = self._order(epoch), trees.leaves(self.arrays)
        for number in range(start, len(self)):
            chosen = order[number * self.size : (number + 1) * self.size]
            yield trees.refill(self.arrays, [namespace(x).take(x, integers(chosen, x), axis=0) for x in leaves])

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.rows)
        return np.argsort(random.uniform(self.seed, f"epoch/{epoch}", (self.rows,)), kind="stable")


def length(batches: Source) -> int | None:
    """How many batches an epoch has, where that is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def groups(batches: Source, count: int, *, start: Position) -> Iterator[tuple[list[Any], Position]]:
    """`count` batches at a time, fewer at the end of an epoch, and where the training is after them; without end.

    Args:
        batches: where they come from.
        count: batches of a group.
        start: what is done already.

    Raises:
        ConfigError: an epoch has no batches.
    """
    epoch, done = start
    while True:
        source = _rest(batches, epoch, done)
        group = list(islice(source, count))
        while group:
            following = list(islice(source, count))  # whether there is one says that the epoch ends
            done += len(group)
            yield group, Position(epoch, done) if following else Position(epoch + 1)
            group = following
        if not done:
            message = (
                f"batches has none in epoch {epoch}; give a list or another object that can be gone through again (an "
                "iterator can once), or a function from the epoch's number to its batches"
            )
            raise ConfigError(message)
        epoch, done = epoch + 1, 0


def _rest(batches: Source, epoch: int, done: int) -> Iterator[Any]:
    if isinstance(batches, Batches):
        return batches(epoch, start=done)
    if isinstance(batches, Sequence):
        return (batches[number] for number in range(done, len(batches)))
    return islice(iter(batches(epoch) if callable(batches) else batches), done, None)
