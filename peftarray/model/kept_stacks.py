"""Stacks of the adapters of batches, kept from one batch to the next.

To gather the factors of 64 adapters takes longer than to compute with them. They are kept where nobody can change the
arrays that they are made of: adapters of NumPy's arrays that were loaded and are not trained, which lie in memory that
may not be written. They take that memory once more. Each adapter has a slot, so that another batch gathers only those
that are new; the room of free slots is zeros that nobody has written to yet, which take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from peftarray.adapted_weight import adapted
from peftarray.arrays import Array, is_constant
from peftarray.composition import composed
from peftarray.layers import Layer
from peftarray.model.acting import Acting
from peftarray.model.adapter_sets import AdapterSet
from peftarray.slots import thin_factors, why_no_slot
from peftarray.stacked_weight import StackedWeight, Stacks, runs_of
from peftarray.stand_in import kind_for

__all__ = ["KeptStacks"]

# So many adapters are kept, or as many as one batch has.
_MOST = 64


class _Owned(NamedTuple):
    """An adapter and its scale; the stacks do not keep it alive."""

    found: ref[AdapterSet]
    scale: float


@dataclass(frozen=True)
class _Kept:
    """Stacks by the name of the tensor, whose slots they have, and how many there are."""

    slots: dict[_Owned, int]
    stacks: Mapping[str, Stacks]
    count: int

    def takes(self, new: Sequence[_Owned]) -> bool:
        """Give free slots to adapters, where there are enough, and their factors fit in."""
        taken = {slot for one, slot in self.slots.items() if one.found() is not None}
        free = [slot for slot in range(self.count) if slot not in taken][: len(new)]
        factors = _factors(new)
        if factors is None or len(free) < len(new) or not all(self._fits(name, each) for name, each in factors.items()):
            return False
        for one, slot in list(self.slots.items()):
            if slot not in taken:
                del self.slots[one]
        for slot in free:  # of those that are gone: they had other tensors perhaps
            for stacks in self.stacks.values():
                stacks.down[slot], stacks.up[slot] = 0, 0
        self.put(free, factors)
        self.slots.update(zip(new, free, strict=True))
        return True

    def put(self, places: Sequence[int], factors: Mapping[str, Sequence[_OfOne]]) -> None:
        """Write factors into slots that hold zeros."""
        for name, each in factors.items():
            for one in each:
                place, rank = places[one.number], len(one.down)
                self.stacks[name].down[place, :rank, :] = one.down
                self.stacks[name].up[place, :rank, :] = one.up.T

    def _fits(self, name: str, factors: Sequence[_OfOne]) -> bool:
        stacks = self.stacks.get(name)
        return stacks is not None and all(
            _alike(one.layer, stacks.layer)
            and len(one.down) <= stacks.up.shape[1]
            and np.result_type(one.down, one.up) == stacks.up.dtype
            for one in factors
        )


class _OfOne(NamedTuple):
    """The factors of one of some adapters, for one tensor."""

    number: int
    down: np.ndarray
    up: np.ndarray
    layer: Layer


class KeptStacks:
    """The stacks of the adapters that batches had of late."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._lock = Lock()  # batches of several threads may bring new adapters

    def __reduce__(self) -> Any:
        return (KeptStacks, ())

    def mixed(
        self, arrays: Mapping[str, Array], acting: Sequence[Acting], places: Sequence[int]
    ) -> dict[str, Array] | None:
        """What `mixed_arrays` gives, where stacks of all these adapters can be kept; None where they cannot.

        Args:
            arrays: the base's.
            acting: the adapters of the batch.
            places: for each sample its adapter among these, -1 for none.
        """
        if len(set(places)) < 2:
            return None
        owned = [_Owned(ref(one.found, self._forget), one.scale) for one in acting if isinstance(one.found, AdapterSet)]
        if len(owned) < len(acting):
            return None
        with self._lock:
            kept = self._with(owned)
            if kept is None or not all(_fits(arrays[name], stacks) for name, stacks in kept.stacks.items()):
                return None
            self._kept = kept
            slots = [kept.slots[one] for one in owned]
        runs = runs_of([None if place < 0 else slots[place] for place in places])
        parts = tuple(place + 1 for place in places)
        found: dict[str, Array] = {}
        for name, stacks in kept.stacks.items():
            base = arrays[name]
            form = cache(lambda name=name, base=base: (base, *(_adapted(one, name, base) for one in acting)))
            found[name] = kind_for(StackedWeight, base)(base, stacks, runs, parts, form)
        return found

    def _with(self, owned: Sequence[_Owned]) -> _Kept | None:
        """Stacks in which these adapters have slots; None where they cannot be kept."""
        kept = self._kept
        new = [one for one in owned if kept is None or one not in kept.slots]
        # Those that are kept were found constant when they came.
        if not all(_is_constant(one.found()) for one in new):
            return None
        if kept is not None and (not new or kept.takes(new)):
            return kept
        before = [] if kept is None else [one for one in kept.slots if one.found() is not None]
        together = list(dict.fromkeys([*before, *owned]))
        return _made(together if len(together) <= _MOST else list(owned))

    def _forget(self, _: Any) -> None:
        # The slots of the others stay; this may come at any moment, also while somebody holds the lock.
        if self._kept is not None and all(one.found() is None for one in list(self._kept.slots)):
            self._kept = None


def _made(wanted: Sequence[_Owned]) -> _Kept | None:
    """Stacks of these adapters, with room for more; None where they cannot be kept."""
    factors = _factors(wanted)
    if factors is None:
        return None
    stacks, count = {}, max(_MOST, len(wanted))
    for name, each in factors.items():
        layer, rank = each[0].layer, max(len(one.down) for one in each)
        if not all(_alike(one.layer, layer) for one in each):
            return None
        dtype = np.result_type(*(factor for one in each for factor in (one.down, one.up)))
        down = np.zeros((count, rank, layer.fan_in), dtype)
        stacks[name] = Stacks(down, np.zeros((count, rank, layer.out), dtype), layer)
    kept = _Kept({one: slot for slot, one in enumerate(wanted)}, stacks, count)
    kept.put(range(len(wanted)), factors)
    return kept


def _factors(wanted: Sequence[_Owned]) -> dict[str, list[_OfOne]] | None:
    """The factors of adapters by the name of the tensor; None where one of them is gone, or has two for a tensor."""
    found: dict[str, list[_OfOne]] = {}
    for number, (owner, scale) in enumerate(wanted):
        adapters = owner()
        if adapters is None:
            return None
        for module, site in adapters.sites.items():
            adapter, of_tensor = adapters.adapters[module], found.setdefault(site.tensor, [])
            if of_tensor and of_tensor[-1].number == number:
                return None
            of_tensor.append(_OfOne(number, *thin_factors(adapter, scale=scale), adapter.layer))
    return found


def _alike(layer: Layer, other: Layer) -> bool:
    return (layer.shape, layer.transposed) == (other.shape, other.transposed)


def _is_constant(found: AdapterSet | None) -> bool:
    """Whether an adapter can have a slot in each of its layers, and nobody can change its arrays."""
    return (
        found is not None
        and not found.whole
        and all(
            adapter.layer.kind == "linear"
            and why_no_slot(adapter) is None
            and all(is_constant(array) for array in adapter.params.values())
            for adapter in found.adapters.values()
        )
    )


def _fits(base: Array, stacks: Stacks) -> bool:
    return isinstance(base, np.ndarray) and base.dtype == stacks.down.dtype


def _adapted(one: Acting, name: str, base: Array) -> Array:
    """The part of a `MixedWeight` that is an adapter's: the base where it adapts something else."""
    found = one.found
    assert isinstance(found, AdapterSet)
    module = next((module for module, site in found.sites.items() if site.tensor == name), None)
    if module is None:
        return base
    return adapted(composed([found.adapters[module]], [one.scale]), base)
