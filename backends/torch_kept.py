"""Factors that a layer keeps from one batch to the next, and how it is known that they are still right.

To gather the factors of 64 adapters takes longer than to compute with them. So each adapter that a batch names gets a
slot in stacks, and the next batch fills only the slots of adapters that are new or were changed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftarray.slots import Factors

__all__ = ["KeptFactors"]

_MOST = 64
"""So many adapters have slots, or as many as one batch has."""


@dataclass(frozen=True, slots=True)
class _Source:
    """An array that a slot was filled from.

    Attributes:
        table, name: which table of a module holds it, and under which name.
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
    def of(cls, holder: nn.Module, name: str) -> _Source:
        """The array that a module holds now."""
        table = holder._parameters if holder._parameters.get(name) is not None else holder._buffers
        array = table[name]
        assert array is not None
        return cls(table, name, array, array.detach(), array.data_ptr(), -1 if array.is_inference() else array._version)


class _Sources:
    """The arrays that some slots were filled from, to be looked at often: a column for each of their attributes."""

    def __init__(self, sources: Iterable[_Source]) -> None:
        every = tuple(sources)
        self._where = [(source.table, source.name) for source in every]
        self._arrays = [source.array for source in every]
        self._kept = [source.memory for source in every]
        self._addresses = [source.address for source in every]
        self._versions = [source.version for source in every]

    def are_as_they_were(self) -> bool:
        """Whether the modules hold the same numbers still."""
        now = [table.get(name) for table, name in self._where]
        return (
            all(map(operator.is_, now, self._arrays))
            and list(map(torch.Tensor.data_ptr, self._arrays)) == self._addresses
            and list(map(_version_of, self._arrays)) == self._versions
        )

    def are_traced(self) -> bool:
        return any(array.requires_grad for array in self._arrays)


_version_of = operator.attrgetter("_version")


@dataclass(slots=True)
class _Slot:
    place: int
    scale: float
    sources: Sequence[_Source]
    used: int = 0


@dataclass(slots=True)
class _Batch:
    """What a batch had: the slots of its adapters, and all that they were filled from."""

    slots: Mapping[str, int]
    sources: _Sources
    used: int = 0


class KeptFactors:
    """Stacks of the adapters that batches had of late, behind slot 0, which is zeros.

    Attributes:
        stacks: `down (K, r, in)`, for an embedding `(K, vocab, r)`, and `up (K, out, r)`. That one lies transposed in
            memory, as `(K, r, out)`, by which a product with a few rows takes two thirds of the time.
    """

    stacks: Factors

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._batches: dict[tuple[tuple[str, float], ...], _Batch] = {}
        self._count = 0

    def slots(
        self,
        scales: Mapping[str, float],
        held: Callable[[str], Iterable[tuple[nn.Module, str]]],
        make: Callable[[Sequence[str], int], Sequence[Factors]],
    ) -> Mapping[str, int] | None:
        """The slot of each adapter of a batch, filled with its factors as they are now.

        Args:
            scales: the adapters, and by what the update of each is multiplied.
            held: name -> the modules that hold its arrays, and under which names.
            make: their names and the least rank -> their factors, all of one shape.

        Returns:
            Name -> slot; None where a gradient is asked for, or an inference tensor hides whether it is written into.
        """
        self._count += 1
        whose = tuple(scales.items())
        batch = self._batches.get(whose)
        if batch is None or not batch.sources.are_as_they_were():
            if not self._are_filled(scales, held, make):
                return None
            every = [self._slots[name] for name in scales]
            slots = {name: slot.place for name, slot in zip(scales, every, strict=True)}
            batch = _Batch(slots, _Sources(itertools.chain.from_iterable(slot.sources for slot in every)))
            if len(self._batches) >= _MOST:
                self._forget_batches()
            self._batches[whose] = batch
        batch.used = self._count
        if torch.is_grad_enabled() and batch.sources.are_traced():
            return None
        return batch.slots

    def _are_filled(
        self,
        scales: Mapping[str, float],
        held: Callable[[str], Iterable[tuple[nn.Module, str]]],
        make: Callable[[Sequence[str], int], Sequence[Factors]],
    ) -> bool:
        """See to it that each adapter has a slot with its factors; whether that can be."""
        tracks = torch.is_grad_enabled()
        new: dict[str, Sequence[_Source]] = {}
        for name, scale in scales.items():
            slot = self._slots.get(name)
            if slot is not None and slot.scale == scale and _Sources(slot.sources).are_as_they_were():
                slot.used = self._count
                continue
            new[name] = [_Source.of(*where) for where in held(name)]
            if any(source.version < 0 or (tracks and source.array.requires_grad) for source in new[name]):
                return False
        if new:
            # What is written here outlives the modes that this batch is made in.
            with torch.inference_mode(False), torch.no_grad():
                self._fill(new, scales, held, make)
        return True

    def drop(self, name: str) -> None:
        """Free the slot of an adapter, if it has one."""
        if name in self._slots:
            self._forget_batches()
            del self._slots[name]

    def _forget_batches(self) -> None:
        for batch in self._batches.values():
            for name in batch.slots:
                self._slots[name].used = max(self._slots[name].used, batch.used)
        self._batches.clear()

    def _fill(
        self,
        new: Mapping[str, Sequence[_Source]],
        scales: Mapping[str, float],
        held: Callable[[str], Iterable[tuple[nn.Module, str]]],
        make: Callable[[Sequence[str], int], Sequence[Factors]],
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
