"""Sums, means, extremes, products, and running sums."""

from __future__ import annotations

import math
from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.rules.family import Family, Needs, Result, conj
from peftarray.autodiff.rules.scatter import put_along_axis

__all__ = ["REDUCTIONS", "axes_of"]

Axis = int | tuple[int, ...] | None

REDUCTIONS = Family(constants=set("all any argmax argmin argsort count_nonzero nonzero searchsorted isin".split()))


@REDUCTIONS.rule("sum")
def _sum(xp: Any, needs: Needs, x: Array, axis: Axis = None, *, dtype: Any = None, keepdims: bool = False) -> Result:
    shape = x.shape
    return (
        xp.sum(x, axis=axis, dtype=dtype, keepdims=keepdims),
        lambda g: (xp.broadcast_to(_stretched(xp, g, shape, axis), shape),),
    )


@REDUCTIONS.rule("mean")
def _mean(xp: Any, needs: Needs, x: Array, axis: Axis = None, *, keepdims: bool = False) -> Result:
    shape = x.shape
    n = _count(shape, axis)
    return (
        xp.mean(x, axis=axis, keepdims=keepdims),
        lambda g: (xp.broadcast_to(_stretched(xp, g / n, shape, axis), shape),),
    )


@REDUCTIONS.rule("var")
def _var(
    xp: Any, needs: Needs, x: Array, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False
) -> Result:
    n = _count(x.shape, axis) - correction
    return (
        xp.var(x, axis=axis, correction=correction, keepdims=keepdims),
        lambda g: (_stretched(xp, g * (2.0 / n), x.shape, axis) * (x - xp.mean(x, axis=axis, keepdims=True)),),
    )


@REDUCTIONS.composition("std")
def _std(xp: Any, x: Array, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False) -> Array:
    return xp.sqrt(xp.var(x, axis=axis, correction=correction, keepdims=keepdims))


@REDUCTIONS.rule("max")
def _max(xp: Any, needs: Needs, x: Array, axis: Axis = None, *, keepdims: bool = False) -> Result:
    return _extreme(xp, xp.max(x, axis=axis, keepdims=keepdims), x, axis)


@REDUCTIONS.rule("min")
def _min(xp: Any, needs: Needs, x: Array, axis: Axis = None, *, keepdims: bool = False) -> Result:
    return _extreme(xp, xp.min(x, axis=axis, keepdims=keepdims), x, axis)


def _extreme(xp: Any, value: Array, x: Array, axis: Axis) -> Result:
    """Entries that are equally extreme share the gradient."""
    reached = xp.astype(x == _stretched(xp, value, x.shape, axis), x.dtype)
    share = reached / xp.sum(reached, axis=axis, keepdims=True)
    return value, lambda g: (_stretched(xp, g, x.shape, axis) * share,)


@REDUCTIONS.rule("prod")
def _prod(xp: Any, needs: Needs, x: Array, axis: Axis = None, *, dtype: Any = None, keepdims: bool = False) -> Result:
    shape = x.shape
    axes = axes_of(shape, axis)
    order = (*(i for i in range(len(shape)) if i not in axes), *axes)

    def pull(g: Array) -> tuple[Array]:
        # The product of the others, from both ends, since a quotient fails at zero.
        kept = tuple(shape[i] for i in order[: len(shape) - len(axes)])
        flat = xp.reshape(xp.permute_dims(x, order), (*kept, -1))
        ones = xp.ones_like(flat[..., :1])
        before = xp.cumulative_prod(xp.concat([ones, flat[..., :-1]], axis=-1), axis=-1)
        after = xp.flip(
            xp.cumulative_prod(xp.flip(xp.concat([flat[..., 1:], ones], axis=-1), axis=-1), axis=-1), axis=-1
        )
        others = xp.reshape(conj(xp, before * after), tuple(shape[i] for i in order))
        back = tuple(order.index(i) for i in range(len(shape)))
        return (_stretched(xp, g, shape, axis) * xp.permute_dims(others, back),)

    return xp.prod(x, axis=axis, dtype=dtype, keepdims=keepdims), pull


@REDUCTIONS.rule("cumulative_sum")
def _cumulative_sum(
    xp: Any, needs: Needs, x: Array, axis: int | None = None, *, dtype: Any = None, include_initial: bool = False
) -> Result:
    along = -1 if axis is None else axis

    def pull(g: Array) -> tuple[Array]:
        if include_initial:
            g = g[_at(slice(1, None), along, g.ndim)]
        return (xp.flip(xp.cumulative_sum(xp.flip(g, axis=along), axis=along), axis=along),)

    return xp.cumulative_sum(x, axis=along, dtype=dtype, include_initial=include_initial), pull


@REDUCTIONS.composition("diff")
def _diff(xp: Any, x: Array, axis: int = -1, *, n: int = 1, prepend: Any = None, append: Any = None) -> Array:
    x = xp.concat([part for part in (prepend, x, append) if part is not None], axis=axis)
    for _ in range(n):
        x = x[_at(slice(1, None), axis, x.ndim)] - x[_at(slice(None, -1), axis, x.ndim)]
    return x


@REDUCTIONS.rule("sort")
def _sort(xp: Any, needs: Needs, x: Array, axis: int = -1, *, descending: bool = False, stable: bool = True) -> Result:
    order = xp.argsort(x, axis=axis, stable=stable)
    order = xp.flip(order, axis=axis) if descending else order  # NumPy sorts upwards alone
    shape = x.shape
    return xp.take_along_axis(x, order, axis=axis), lambda g: (put_along_axis(xp, shape, order, g, axis),)


def axes_of(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The axes that are reduced, each counted from the first."""
    if axis is None:
        return tuple(range(len(shape)))
    return tuple(i % len(shape) for i in (axis if isinstance(axis, tuple) else (axis,)))


def _count(shape: tuple[int, ...], axis: Axis) -> int:
    """How many entries are reduced to one."""
    return math.prod(shape[i] for i in axes_of(shape, axis))


def _stretched(xp: Any, reduced: Array, shape: tuple[int, ...], axis: Axis) -> Array:
    """What was reduced, with a length of one along each axis that is gone."""
    if reduced.ndim == len(shape):
        return reduced
    axes = axes_of(shape, axis)
    return xp.reshape(reduced, tuple(1 if i in axes else n for i, n in enumerate(shape)))


def _at(part: slice, axis: int, ndim: int) -> tuple[slice, ...]:
    """The index that takes `part` along one axis and everything along the others."""
    return tuple(part if i == axis % ndim else slice(None) for i in range(ndim))
