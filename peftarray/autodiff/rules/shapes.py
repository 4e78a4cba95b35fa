"""Functions that move entries and do not change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peftarray.arrays import Array, device
from peftarray.autodiff.rules.family import Family, Needs, Result, Wanted
from peftarray.autodiff.rules.scatter import add_rows

__all__ = ["SHAPES"]

SHAPES = Family()


@SHAPES.rule("reshape")
def _reshape(xp: Any, needs: Needs, x: Array, shape: Any, *, copy: bool | None = None) -> Result:
    before = x.shape
    return xp.reshape(x, shape, copy=copy), lambda g: (xp.reshape(g, before),)


@SHAPES.rule("permute_dims")
def _permute_dims(xp: Any, needs: Needs, x: Array, axes: Sequence[int]) -> Result:
    ndim = x.ndim
    forward = [axis % ndim for axis in axes]
    back = tuple(forward.index(i) for i in range(ndim))
    return xp.permute_dims(x, tuple(axes)), lambda g: (xp.permute_dims(g, back),)


@SHAPES.rule("matrix_transpose")
def _matrix_transpose(xp: Any, needs: Needs, x: Array, /) -> Result:
    return x.mT, lambda g: (g.mT,)


@SHAPES.composition("moveaxis")
def _moveaxis(xp: Any, x: Array, source: Any, destination: Any) -> Array:
    sources = [axis % x.ndim for axis in (source if isinstance(source, tuple) else (source,))]
    targets = [axis % x.ndim for axis in (destination if isinstance(destination, tuple) else (destination,))]
    order = [axis for axis in range(x.ndim) if axis not in sources]
    for target, axis in sorted(zip(targets, sources, strict=True)):
        order.insert(target, axis)
    return xp.permute_dims(x, tuple(order))


@SHAPES.rule("expand_dims")
def _expand_dims(xp: Any, needs: Needs, x: Array, axis: Any = 0) -> Result:
    before = x.shape
    return xp.expand_dims(x, axis=axis), lambda g: (xp.reshape(g, before),)


@SHAPES.rule("squeeze")
def _squeeze(xp: Any, needs: Needs, x: Array, axis: Any = None) -> Result:
    before = x.shape
    axis = tuple(i for i, n in enumerate(before) if n == 1) if axis is None else axis
    return xp.squeeze(x, axis=axis), lambda g: (xp.reshape(g, before),)


@SHAPES.rule("broadcast_to")
def _broadcast_to(xp: Any, needs: Needs, x: Array, shape: Any) -> Result:
    return xp.broadcast_to(x, shape), lambda g: (g,)  # the walk sums it


@SHAPES.composition("broadcast_arrays")
def _broadcast_arrays(xp: Any, *arrays: Array) -> list[Array]:
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return [xp.broadcast_to(array, shape) for array in arrays]


@SHAPES.composition("meshgrid")
def _meshgrid(xp: Any, *arrays: Array, indexing: str = "xy") -> list[Array]:
    places = list(range(len(arrays)))
    if indexing == "xy":
        places[:2] = places[:2][::-1]
    shape = tuple(arrays[place].shape[0] for place in places)
    return [
        xp.broadcast_to(xp.reshape(array, tuple(-1 if place == i else 1 for place in places)), shape)
        for i, array in enumerate(arrays)
    ]


@SHAPES.rule("flip")
def _flip(xp: Any, needs: Needs, x: Array, axis: Any = None) -> Result:
    return xp.flip(x, axis=axis), lambda g: (xp.flip(g, axis=axis),)


@SHAPES.rule("roll")
def _roll(xp: Any, needs: Needs, x: Array, shift: Any, axis: Any = None) -> Result:
    back = tuple(-n for n in shift) if isinstance(shift, tuple) else -shift
    return xp.roll(x, shift, axis=axis), lambda g: (xp.roll(g, back, axis=axis),)


@SHAPES.rule("repeat")
def _repeat(xp: Any, needs: Needs, x: Array, repeats: Any, axis: int | None = None) -> Result:
    shape = x.shape if axis is not None else (math.prod(x.shape),)
    along = 0 if axis is None else axis % x.ndim

    def pull(g: Array) -> Wanted:
        if isinstance(repeats, int):
            parts = xp.reshape(g, (*shape[: along + 1], repeats, *shape[along + 1 :]))
            return (xp.reshape(xp.sum(parts, axis=along + 1), x.shape),)
        order = (along, *(i for i in range(g.ndim) if i != along))
        places = xp.repeat(xp.arange(shape[along], device=device(g)), repeats)
        total = add_rows(xp, xp.permute_dims(g, order), places, shape[along])
        return (xp.reshape(xp.permute_dims(total, tuple(order.index(i) for i in range(g.ndim))), x.shape),)

    return xp.repeat(x, repeats, axis=axis), pull


@SHAPES.rule("tile")
def _tile(xp: Any, needs: Needs, x: Array, repetitions: Any) -> Result:
    repetitions = (repetitions,) if isinstance(repetitions, int) else tuple(repetitions)
    before = x.shape
    ndim = max(len(before), len(repetitions))
    lengths = (1,) * (ndim - len(before)) + before
    times = (1,) * (ndim - len(repetitions)) + repetitions

    def pull(g: Array) -> Wanted:
        pairs = tuple(n for pair in zip(times, lengths, strict=True) for n in pair)
        return (xp.reshape(xp.sum(xp.reshape(g, pairs), axis=tuple(range(0, 2 * ndim, 2))), before),)

    return xp.tile(x, repetitions), pull


@SHAPES.rule("concat", spread=True)
def _concat(xp: Any, needs: Needs, *arrays: Array, axis: int | None = 0) -> Result:
    shapes = [array.shape if axis is not None else (math.prod(array.shape),) for array in arrays]
    before = [array.shape for array in arrays]
    along = 0 if axis is None else axis % arrays[0].ndim

    def pull(g: Array) -> Wanted:
        parts, start = [], 0
        for wanted, shape, old in zip(needs, shapes, before, strict=True):
            stop = start + shape[along]
            part = g[(*(slice(None),) * along, slice(start, stop), ...)] if wanted else None
            parts.append(xp.reshape(part, old) if wanted and axis is None else part)
            start = stop
        return parts

    return xp.concat(list(arrays), axis=axis), pull


@SHAPES.rule("stack", spread=True)
def _stack(xp: Any, needs: Needs, *arrays: Array, axis: int = 0) -> Result:
    along = axis % (arrays[0].ndim + 1)
    return xp.stack(list(arrays), axis=axis), lambda g: [
        g[(*(slice(None),) * along, i, ...)] if wanted else None for i, wanted in enumerate(needs)
    ]


@SHAPES.rule("unstack")
def _unstack(xp: Any, needs: Needs, x: Array, /, *, axis: int = 0) -> Result:
    values = tuple(xp.unstack(x, axis=axis))

    def pull(parts: Wanted) -> Wanted:
        some = next(part for part in parts if part is not None)
        zeros = xp.zeros_like(some)
        return (xp.stack([zeros if part is None else part for part in parts], axis=axis),)

    return values, pull


@SHAPES.rule("tril")
def _tril(xp: Any, needs: Needs, x: Array, k: int = 0) -> Result:
    return xp.tril(x, k=k), lambda g: (xp.tril(g, k=k),)


@SHAPES.rule("triu")
def _triu(xp: Any, needs: Needs, x: Array, k: int = 0) -> Result:
    return xp.triu(x, k=k), lambda g: (xp.triu(g, k=k),)


@SHAPES.rule("astype")
def _astype(xp: Any, needs: Needs, x: Array, dtype: Any, *, copy: bool = True, device: Any = None) -> Result:
    value = xp.astype(x, dtype, copy=copy) if device is None else xp.astype(x, dtype, copy=copy, device=device)
    # The walk casts the gradient back. Whole numbers and truth values have none.
    return value, (lambda g: (g,)) if xp.isdtype(dtype, ("real floating", "complex floating")) else None


@SHAPES.rule("to_device")
def _to_device(xp: Any, needs: Needs, x: Array, target: Any) -> Result:
    home = device(x)
    return x.to_device(target), lambda g: (g.to_device(home),)
