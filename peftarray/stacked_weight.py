"""A weight that is another for each sample of a batch, by low-rank adapters in stacks that outlive the batch: NumPy's.

Where `MixedWeight` takes the factors of each adapter and stacks them, here they are stacked already, and laid out as
BLAS likes them: `down (K, R, in)` and `up (K, R, out)`, the scale within `up`. A run of samples whose slots follow each
other is one product of stacks, of which nothing is copied; what it adds is made in pieces that stay in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from peftarray.arrays import Array, add_matmul_into
from peftarray.layers import Layer
from peftarray.mixed import MixedWeight
from peftarray.stand_in import OverArray, kind_for

__all__ = ["Run", "StackedWeight", "Stacks", "runs_of"]


# So many numbers and their sum stay in a core's cache.
_CACHED = 1 << 17


class Run(NamedTuple):
    """Samples that stand together: some slots that follow each other by one step, with so many samples for each; and
    all that so many times.
    """

    start: int
    stop: int
    slot: int
    step: int = 1
    width: int = 1
    times: int = 1

    @property
    def slot_count(self) -> int:
        """How many slots there are."""
        return (self.stop - self.start) // (self.width * self.times)

    @property
    def slots(self) -> slice:
        """The slots."""
        return slice(self.slot, self.slot + (self.slot_count - 1) * self.step + 1, self.step)


class Stacks(NamedTuple):
    """Factors of adapters of one layer."""

    down: np.ndarray
    up: np.ndarray
    layer: Layer


def runs_of(slots: Sequence[int | None]) -> tuple[Run, ...]:
    """The slots of samples as runs, without those that have none.

    Example:
        >>> runs_of([0, 0, 3, 3, None, 1, 2, 1, 2])
        (Run(start=0, stop=4, slot=0, step=3, width=2, times=1), Run(start=5, stop=9, slot=1, step=1, width=1, times=2))
    """
    found: list[Run] = []
    for run in _once_each(slots):
        last = found[-1] if found else None
        if last is not None and last.stop == run.start and _of_once(last) == _of_once(run):
            found[-1] = last._replace(stop=run.stop, times=last.times + 1)
        else:
            found.append(run)
    return tuple(found)


def _of_once(run: Run) -> tuple[int, ...]:
    """What runs have alike that are one several times."""
    return run.slot, run.step, run.width, run.slot_count


def _once_each(slots: Sequence[int | None]) -> list[Run]:
    """The slots as runs that come once."""
    found: list[Run] = []
    place = 0
    for slot, group in itertools.groupby(slots):
        start, place = place, place + sum(1 for _ in group)
        if slot is None:
            continue
        last, width = found[-1] if found else None, place - start
        follows = last is not None and (last.stop, last.width) == (start, width) and slot > last.slot
        if last is not None and follows and last.slot_count == 1:
            found[-1] = last._replace(stop=place, step=slot - last.slot)
        elif last is not None and follows and slot == last.slot + last.step * last.slot_count:
            found[-1] = last._replace(stop=place)
        else:
            found.append(Run(start, place, slot, width=width))
    return found


class StackedWeight(OverArray, MixedWeight):
    """A `MixedWeight` whose parts are formed only for what the stacks do not serve.

    Args:
        base: the frozen weight as the model stores it.
        stacks: of the layer.
        runs: the slots of the samples.
        places: for each sample, which of the parts.
        form: makes the parts.
    """

    def __init__(
        self,
        base: np.ndarray,
        stacks: Stacks,
        runs: Sequence[Run],
        places: tuple[int, ...],
        form: Callable[[], tuple[Array, ...]],
        flipped: bool = False,
    ) -> None:
        self.places = places
        self._flipped = flipped
        self.base = base
        self._stacks, self._runs, self._form = stacks, runs, form

    @property
    def parts(self) -> tuple[Array, ...]:  # type: ignore[override]
        return self._form()

    @property
    def mT(self) -> Self:
        return type(self)(self.base, self._stacks, self._runs, self.places, self._form, not self._flipped)

    def after(self, x: Array) -> Array:
        layer = self._stacks.layer
        if not isinstance(x, np.ndarray) or x.ndim < 2 or self._flipped == layer.transposed:
            return self._mixed.after(x)
        samples = self._by_sample(x)
        samples = samples.reshape(samples.shape[0], -1, samples.shape[-1])
        # A product of NumPy's is a new array, whose rows stand together.
        y = x @ layer.view(self.base).mT
        by_sample = y.reshape(samples.shape[0], -1, y.shape[-1])
        down, up, _ = self._stacks
        for run in self._runs:
            sizes = run.times, run.slot_count, -1
            given = samples[run.start : run.stop].reshape(*sizes, x.shape[-1])
            out = by_sample[run.start : run.stop].reshape(*sizes, y.shape[-1])
            for some, its in zip(out, given, strict=True):
                if run.slot_count == 1:
                    add_matmul_into(some[0], its[0] @ down[run.slot].mT, up[run.slot])
                else:
                    _add_products(some, np.matmul(its, down[run.slots].mT), up[run.slots])
        return y

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        return self._mixed.flatten()

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Any:
        return kind_for(MixedWeight, *arrays).unflatten(rest, arrays)

    @property
    def _mixed(self) -> MixedWeight:
        """The same of its parts."""
        return kind_for(MixedWeight, self.base)(self.parts, self.places, self._flipped)


def _add_products(y: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """`y += left @ right` of stacks of matrices, a few at a time."""
    step = max(1, _CACHED // max(1, y[:1].size))
    made = np.empty((min(step, len(y)), *y.shape[1:]), np.result_type(left, right))
    for start in range(0, len(y), step):
        some = slice(start, start + step)
        part = y[some]
        part += np.matmul(left[some], right[some], out=made[: len(part)])
