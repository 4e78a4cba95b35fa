"""Weights and biases that differ from sample to sample of a batch, in place of one array.

What goes through them are samples `(n, ..., in)`, or their rows `(n * m, in)` with those of one sample together, as the
models of `peftarray.models` have them. However many adapters a batch has, it goes through the layer once:

- Adapters that add two thin products are stacked, each sample with its own, beside one product with the frozen weight.
- Otherwise the samples are brought together by adapter, each adapter takes its segment, and what comes out is put back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from peftarray.adapted_weight import AdaptedWeight
from peftarray.adapter import Adapter, beside_short
from peftarray.arrays import Array, device, integers, namespace
from peftarray.errors import ShapeError, UnsupportedError
from peftarray.layers import Layer, Window, contract
from peftarray.method import AdapterConfig
from peftarray.slots import Factors, padded, slot_update, stack_slots, thin_factors, why_not_thin
from peftarray.stand_in import StandIn, kind_for

__all__ = ["MixedBias", "MixedWeight", "mixed_bias", "mixed_weight"]


class _Mixed(StandIn):
    """One of several arrays, or what stands for them, for each sample of a batch.

    Attributes:
        parts: the different ones, of one shape.
        places: for each sample, which of them.
    """

    parts: tuple[Array, ...]
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def device(self) -> Any:
        return device(self.parts[0])

    def dense(self) -> Array:
        message = (
            f"the samples of this batch have different weights here {self.shape}, so there is no one array to form; "
            "use x @ w.T, w[ids], y + b or their like, or run the samples of each adapter apart"
        )
        raise UnsupportedError(message)

    def _by_sample(self, x: Array) -> Array:
        """`x` by samples, `(n, m, ...)` where its rows are flattened."""
        count = len(self.places)
        if x.ndim == 0 or x.shape[0] % count:
            message = f"the batch has {count} samples (adapter_names), and the layer got {tuple(x.shape)}"
            raise ShapeError(message)
        return namespace(x).reshape(x, (count, x.shape[0] // count, *x.shape[1:]))


class MixedWeight(_Mixed):
    """A weight that is another for each sample; see the module.

    Example:
        >>> import numpy as np
        >>> w = mixed_weight([np.eye(2), 2 * np.eye(2)], [1, 0, 1])
        >>> (np.ones((3, 2)) @ w.T).tolist()
        [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
    """

    def __init__(self, parts: tuple[Array, ...], places: tuple[int, ...], flipped: bool = False) -> None:
        self.parts = parts
        self.places = places
        self._flipped = flipped

    @property
    def shape(self) -> tuple[int, ...]:
        shape = super().shape
        return shape[::-1] if self._flipped else shape

    @property
    def mT(self) -> Self:
        return type(self)(self.parts, self.places, not self._flipped)

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Array:
        """As `AdaptedWeight.kept`, for each sample."""
        parts = [part.kept(keep) if isinstance(part, AdaptedWeight) else part for part in self.parts]
        found = mixed_weight(parts, self.places)
        return found.mT if self._flipped else found

    def after(self, x: Array) -> Array:
        layer = self._layer
        if layer is not None and layer.kind == "linear" and self._flipped != layer.transposed:
            thin = self._thin()
            if thin is not None:
                return self._stacked(x, layer, *thin)

        def through(part: Array, some: Array) -> Array:
            rows = namespace(some).reshape(some, (-1, some.shape[-1]))
            return rows @ (part.mT if self._flipped else part)

        return self._by_segments(x, through, (*x.shape[:-1], self.shape[1]))

    def rows(self, indices: Array) -> Array:
        if self._flipped:
            return NotImplemented

        def through(part: Array, some: Array) -> Array:
            return namespace(part).take(part, namespace(some).reshape(some, (-1,)), axis=0)

        return self._by_segments(indices, through, (*indices.shape, self.shape[1]))

    def convolved(self, x: Array, window: tuple[tuple[int, ...], ...], groups: int) -> Array:
        layer = self._layer
        if layer is None or layer.kind != "conv" or len(layer.kernel) != len(window[0]):
            return NotImplemented
        stride, padding, dilation = window
        here = replace(layer, window=Window(stride, padding, dilation, groups))

        def through(part: Array, some: Array) -> Array:
            some = namespace(some).reshape(some, (-1, *x.shape[1:]))
            if isinstance(part, StandIn):
                return part.convolved(some, window, groups)
            return contract(some, here.view(part), here)

        return self._by_segments(x, through, None)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        arrays, rests = _take_apart(self.parts)
        return arrays, (rests, self.places, self._flipped)

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        rests, places, flipped = rest
        return cls(_put_together(rests, arrays), places, flipped)

    @property
    def _layer(self) -> Any:
        return next((part.adapter.layer for part in self.parts if isinstance(part, AdaptedWeight)), None)

    def _thin(self) -> tuple[Array, list[Factors | None]] | None:
        """The frozen weight and the factors of each part, where all adapters add two thin products to those of one."""
        bases = [part.base if isinstance(part, AdaptedWeight) else part for part in self.parts]
        parts = [_pairs(part) for part in self.parts]
        if isinstance(bases[0], StandIn) or any(base is not bases[0] for base in bases):
            return None
        if any(pairs is None or any(why_not_thin(adapter) for adapter, _ in pairs) for pairs in parts):
            return None
        found: list[Factors | None] = []
        for pairs in parts:
            factors = [thin_factors(adapter, scale=scale) for adapter, scale in pairs or ()]
            if len(factors) < 2:
                found.append(factors[0] if factors else None)
                continue
            downs, ups = zip(*factors, strict=True)
            xp = namespace(*downs, *ups)
            found.append((xp.concat(downs, axis=0), xp.concat(ups, axis=1)))
        return bases[0], found

    def _stacked(self, x: Array, layer: Layer, base: Array, factors: Sequence[Factors | None]) -> Array:
        """All samples at once, each with the factors of its own beside one product with the frozen weight."""
        self._by_sample(x)
        known = [pair for pair in factors if pair is not None]
        rank = max(down.shape[0] for down, _ in known)
        every = [None if pair is None else padded(pair, rank) for pair in factors]
        down, up = stack_slots([pair for pair in every if pair is not None])
        numbers = itertools.count(1)
        slots = [0 if pair is None else next(numbers) for pair in every]
        index = integers([slots[place] for place in self.places], known[0][0])

        def apply(given: Array, wide: Array) -> Array:
            return contract(given, layer.view(wide), layer) + slot_update(given, down, up, index, layer)

        return beside_short(apply, x, base, layer)

    def _by_segments(self, x: Array, through: Callable[[Array, Array], Array], shape: tuple[int, ...] | None) -> Array:
        """Each part on the samples that are its own; what comes out has this shape, or is of samples."""
        samples = self._by_sample(x)
        order = np.argsort(self.places, kind="stable")
        in_order = bool((order == np.arange(len(order))).all())
        if not in_order:
            samples = namespace(samples).take(samples, integers(order, samples), axis=0)
        found, start = [], 0
        for place, part in enumerate(self.parts):
            stop = start + self.places.count(place)
            y = through(part, samples[start:stop, ...])
            found.append(namespace(y).reshape(y, (stop - start, -1, *y.shape[1:])))
            start = stop
        xp = namespace(*found)
        y = xp.concat(found, axis=0)
        if not in_order:
            y = xp.take(y, integers(np.argsort(order, kind="stable"), y), axis=0)
        return xp.reshape(y, shape or (y.shape[0], *y.shape[2:]))


class MixedBias(_Mixed):
    """A bias that is another for each sample: only `y + b` is possible."""

    def __init__(self, parts: tuple[Array, ...], places: tuple[int, ...]) -> None:
        self.parts = parts
        self.places = places

    @property
    def mT(self) -> Self:
        message = "the biases of a batch are added, and have no transpose"
        raise UnsupportedError(message)

    def after(self, x: Array) -> Array:
        return NotImplemented

    def plus(self, x: Array) -> Array:
        if not hasattr(x, "shape") or x.ndim < 2:
            return NotImplemented
        xp = namespace(*self.parts)
        rows = xp.take(xp.stack(self.parts, axis=0), integers(self.places, self.parts[0]), axis=0)
        samples = self._by_sample(x)
        xp = namespace(samples, rows)
        rows = xp.reshape(rows, (rows.shape[0], *(1 for _ in samples.shape[2:]), rows.shape[1]))
        return xp.reshape(samples + rows, x.shape)

    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        return self.parts, self.places

    @classmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        return cls(tuple(arrays), rest)


def mixed_weight(parts: Sequence[Array], places: Sequence[int]) -> Array:
    """The weight of each sample as one object: the part itself where it is everybody's.

    Args:
        parts: arrays, or what stands for them, of one shape.
        places: for each sample, which of them.
    """
    return _mixed(MixedWeight, parts, places)


def mixed_bias(parts: Sequence[Array], places: Sequence[int]) -> Array:
    """As `mixed_weight`, for biases `(out,)`."""
    return _mixed(MixedBias, parts, places)


def _mixed(kind: type[Any], parts: Sequence[Array], places: Sequence[int]) -> Array:
    used: dict[int, int] = {}
    own: list[Array] = []
    found = []
    for place in places:
        part = parts[place]
        if id(part) not in used:
            used[id(part)] = len(own)
            own.append(part)
        found.append(used[id(part)])
    if len(own) == 1:
        return own[0]
    # What is of one type is of one library.
    arrays, _ = _take_apart(tuple({type(part): part for part in own}.values()))
    return kind_for(kind, *arrays)(tuple(own), tuple(found))


def _take_apart(parts: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    arrays: list[Array] = []
    rests = []
    for part in parts:
        own, rest = part.flatten() if isinstance(part, StandIn) else ((part,), None)
        kind = part._abstract if isinstance(part, StandIn) else None
        nested, inner = _take_apart(own) if any(isinstance(array, StandIn) for array in own) else (own, None)
        arrays.extend(nested)
        rests.append((kind, rest, len(nested), inner))
    return tuple(arrays), tuple(rests)


def _put_together(rests: Any, arrays: Sequence[Array]) -> tuple[Array, ...]:
    parts, start = [], 0
    for kind, rest, count, inner in rests:
        own = tuple(arrays[start : start + count])
        start += count
        own = _put_together(inner, own) if inner is not None else own
        parts.append(own[0] if kind is None else kind_for(kind, *own).unflatten(rest, own))
    return tuple(parts)


def _pairs(part: Array) -> Sequence[tuple[Adapter, float]] | None:
    """The adapters of a part with their scales; none for an array, None for what drops something in training."""
    if not isinstance(part, AdaptedWeight):
        return None if isinstance(part, StandIn) else ()
    adapter = part.adapter
    if part.drops():
        return None
    if isinstance(adapter, Adapter):
        return ((adapter, 1.0),)
    return [pair for pair in zip(adapter.adapters, adapter.scales, strict=True) if "weight" in pair[0].touches()]
