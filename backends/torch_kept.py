"""Factors that a layer keeps from one batch to the next, and how it is known that they are still right.

To gather the factors of 64 adapters takes longer than to compute with them. So each adapter that a batch names gets a
slot in stacks, and the next batch fills only the slots of adapters that are new or were changed. For that, only arrays
that others may have are looked at: to look at all those of 64 adapters takes half as long as to compute with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peftarray.backends.torch_arrays import Lent

from peftarray.slots import Factors

__all__ = ["KeptFactors"]

_Held = Callable[[str], Iterable[tuple[Mapping[str, Any], str]]]
_Make = Callable[[Sequence[str], int], Sequence[Factors]]

_MOST = 64
"""So many adapters have slots, or as many as one batch has."""


@dataclass(frozen=True, slots=True)
class _Source:
    """An array that a slot was filled from.

    Attributes:
        table, name: torch's table that holds it, and under which name.
        array: itself.
        memory: an alias, so that no other array gets its address.
        address: where its numbers lay.
        version: how often they had been written into; -1 where torch does not count, for inference tensors.
    """

    table: Mapping[str, Any]
    name: str
    array: torch.Tensor
    memory: torch.Tensor
    address: int
    version: int

    @classmethod
    def of(cls, table: Mapping[str, Any], name: str) -> _Source:
        """The array that is held now."""
        array = table[name]
        version = -1 if array.is_inference() else array._version
        return cls(table, name, array, array.detach(), array.data_ptr(), version)

    def is_as_it_was(self) -> bool:
        """Whether the same numbers are held still."""
        array = self.array
        return (
            self.version >= 0
            and self.table.get(self.name) is array
            and array.data_ptr() == self.address
            and array._version == self.version
        )


@dataclass(slots=True)
class _Slot:
    place: int
    scale: float
    sources: Sequence[_Source]
    used: int = 0


@dataclass(slots=True)
class _Batch:
    """What a batch had: the slots of its adapters, and what they were filled from; of that, what others may have."""

    slots: Mapping[str, int]
    sources: Sequence[_Source]
    lent: Sequence[_Source]
    used: int = 0

    def is_right(self) -> bool:
        return all(source.is_as_it_was() for source in self.lent)

    def is_traced(self) -> bool:
        return any(source.array.requires_grad for source in self.sources)


class KeptFactors:
    """Stacks of the adapters that batches had of late, behind slot 0, which is zeros.

    Attributes:
        stacks: `down (K, r, in)`, for an embedding `(K, vocab, r)`, and `up (K, out, r)`. That one lies transposed in
            memory, as `(K, r, out)`, by which a product with a few rows takes two thirds of the time.
    """

    stacks: Factors

    def __init__(self, lent: Lent) -> None:
        """Stacks without slots.

        Args:
            lent: the adapters whose arrays others may have.
        """
        self._lent = lent
        self._noted = lent.times
        self._slots: dict[str, _Slot] = {}
        self._batches: dict[tuple[tuple[str, float], ...], _Batch] = {}
        self._count = 0

    def slots(self, scales: Mapping[str, float], held: _Held, make: _Make) -> Mapping[str, int] | None:
        """The slot of each adapter of a batch, filled with its factors as they are now.

        Args:
            scales: the adapters, and by what the update of each is multiplied.
            held: name -> the tables that hold its arrays, and under which names.
            make: their names and the least rank -> their factors, all of one shape.

        Returns:
            Name -> slot; None where a gradient is asked for, or an inference tensor hides whether it is written into.
        """
        self._count += 1
        if self._noted != self._lent.times:
            self._note()
        whose = tuple(scales.items())
        batch = self._batches.get(whose)
        if batch is None or not batch.is_right():
            if not self._are_filled(scales, held, make):
                return None
            batch = self._batch(scales)
            if len(self._batches) >= _MOST:
                self._forget_batches()
            self._batches[whose] = batch
        batch.used = self._count
        if torch.is_grad_enabled() and batch.is_traced():
            return None
        return batch.slots

    def drop(self, name: str) -> None:
        """Free the slot of an adapter, if it has one."""
        if name in self._slots:
            self._forget_batches()
            del self._slots[name]

    def _note(self) -> None:
        """Take in what became of adapters: which ones were lent, and which changed or went."""
        self._forget_batches()
        for name in self._lent.changed:
            self.drop(name)
        self._lent.changed.clear()
        self._noted = self._lent.times

    def _batch(self, scales: Mapping[str, float]) -> _Batch:
        every = {name: self._slots[name] for name in scales}
        return _Batch(
            {name: slot.place for name, slot in every.items()},
            [source for slot in every.values() for source in slot.sources],
            [source for name, slot in every.items() if name in self._lent.names for source in slot.sources],
        )

    def _are_filled(self, scales: Mapping[str, float], held: _Held, make: _Make) -> bool:
        """See to it that each adapter has a slot with its factors; whether that can be."""
        tracks = torch.is_grad_enabled()
        new: dict[str, Sequence[_Source]] = {}
        for name, scale in scales.items():
            slot, is_lent = self._slots.get(name), name in self._lent.names
            if slot is not None and slot.scale == scale:
                if not is_lent or all(source.is_as_it_was() for source in slot.sources):
                    slot.used = self._count
                    continue
            new[name] = [_Source.of(*where) for where in held(name)]
            if any((is_lent and source.version < 0) or (tracks and source.array.requires_grad) for source in new[name]):
                return False
        if new:
            # What is written here outlives the modes that this batch is made in.
            with torch.inference_mode(False), torch.no_grad():
                self._fill(new, scales, held, make)
        return True

    def _forget_batches(self) -> None:
        for batch in self._batches.values():
            for name in batch.slots:
                self._slots[name].used = max(self._slots[name].used, batch.used)
        self._batches.clear()

    def _fill(
        self, new: Mapping[str, Sequence[_Source]], scales: Mapping[str, float], held: _Held, make: _Make
    ) -> None:
        for name in new:
            self.drop(name)
        factors = make(list(new), self.stacks[1].shape[2]) if self._slots else None
        if factors is None or not _fit(factors, self.stacks):
            self._batches.clear()
            self._slots.clear()
            new = {name: new.get(name) or [_Source.of(*where) for where in held(name)] for name in scales}
            factors = make(list(new), 0)
            self.stacks = _room(factors, len(new))
        places = self._places(len(new))
        if places[-1] >= len(self.stacks[0]):
            self.stacks = _grown(self.stacks, places[-1])
        for place, (name, sources), own in zip(places, new.items(), factors, strict=True):
            for stack, factor in zip(self.stacks, own, strict=True):
                stack[place] = factor
            self._slots[name] = _Slot(place, scales[name], sources, self._count)

    def _places(self, count: int) -> list[int]:
        """Places for so many adapters, one after the other where that can be; what was used longest ago makes room."""
        self._forget_batches()
        idle = sorted(
            (name for name, slot in self._slots.items() if slot.used < self._count),
            key=lambda name: self._slots[name].used,
        )
        while idle and len(self._slots) + count > _MOST:
            self.drop(idle.pop(0))
        taken = {slot.place for slot in self._slots.values()}
        return [place for place in range(1, len(taken) + count + 1) if place not in taken][:count]


def _fit(factors: Sequence[Factors], stacks: Factors) -> bool:
    return all(
        own.shape == stack.shape[1:] and own.dtype is stack.dtype and own.device == stack.device
        for pair in factors
        for own, stack in zip(pair, stacks, strict=True)
    )


def _room(factors: Sequence[Factors], count: int) -> Factors:
    """Stacks for so many adapters with factors like these."""
    down, up = factors[0]
    dtype = down.dtype
    for pair in factors:
        for own in pair:
            dtype = torch.promote_types(dtype, own.dtype)
    downs = torch.empty((count + 1, *down.shape), dtype=dtype, device=down.device)
    ups = torch.empty((count + 1, up.shape[1], up.shape[0]), dtype=dtype, device=up.device)
    downs[0], ups[0] = 0, 0
    return downs, ups.mT


def _grown(stacks: Factors, least: int) -> Factors:
    """The same with room for at least so many adapters, and for some to come."""
    down, up = stacks
    before = down.shape[0]
    grown = _room([(down[0], up[0])], max(least, min(2 * (before - 1), _MOST)))
    for new, old in zip(grown, stacks, strict=True):
        new[:before] = old
    return grown
