"""Stacks of the adapters of batches, kept from one batch to the next.

To gather the factors of 64 adapters takes longer than to compute with them. They are kept where nobody can change the
arrays that they are made of: adapters of NumPy's arrays that were loaded and are not trained, which lie in memory that
may not be written. They take that memory once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from peftarray.adapted_weight import adapted
from peftarray.arrays import Array, is_constant
from peftarray.composition import composed
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
    """Stacks by the name of the tensor, and whose slots they have."""

    slots: Mapping[_Owned, int]
    stacks: Mapping[str, Stacks]


class KeptStacks:
    """The stacks of the adapters that batches had of late."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

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
        kept = self._kept
        if len(owned) < len(acting):
            return None
        new = [one for one in owned if kept is None or one not in kept.slots]
        if new:
            # Those that are kept were found constant when they came.
            kept = _made(self._wanted(owned)) if all(_is_constant(one.found()) for one in new) else None
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

    def _wanted(self, owned: Sequence[_Owned]) -> list[_Owned]:
        """Those of the batch, and those that are kept if not too many come together."""
        before = [] if self._kept is None else [one for one in self._kept.slots if one.found() is not None]
        together = list(dict.fromkeys([*before, *owned]))
        return together if len(together) <= _MOST else list(owned)

    def _forget(self, _: Any) -> None:
        self._kept = None


def _made(wanted: Sequence[_Owned]) -> _Kept | None:
    """Stacks of these adapters; None where they cannot be kept."""
    sets = [one.found() for one in wanted]
    by_tensor: dict[str, list[tuple[int, Any]]] = {}
    for slot, found in enumerate(sets):
        if found is None:
            return None
        for module, site in found.sites.items():
            by_tensor.setdefault(site.tensor, []).append((slot, found.adapters[module]))
    stacks = {}
    for name, adapters in by_tensor.items():
        first, slots = adapters[0][1].layer, [slot for slot, _ in adapters]
        alike = all((a.layer.shape, a.layer.transposed) == (first.shape, first.transposed) for _, a in adapters)
        if not alike or len(set(slots)) < len(slots):
            return None
        factors = [thin_factors(adapter, scale=wanted[slot].scale) for slot, adapter in adapters]
        rank = max(len(down) for down, _ in factors)
        dtype = np.result_type(*(factor for pair in factors for factor in pair))
        down = np.zeros((len(wanted), first.fan_in, rank), dtype)
        up = np.zeros((len(wanted), rank, first.out), dtype)
        for slot, (own_down, own_up) in zip(slots, factors, strict=True):
            down[slot, :, : len(own_down)] = own_down.T
            up[slot, : len(own_down), :] = own_up.T
        stacks[name] = Stacks(down, up, first)
    return _Kept({one: slot for slot, one in enumerate(wanted)}, stacks)


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
