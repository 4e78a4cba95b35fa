"""NumPy's names for what the standard calls otherwise or leaves out, for model code that calls NumPy itself.

Each is a function `f(xp, *arguments)`, where `xp` can trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peftarray.arrays import Array

__all__ = ["METHODS", "find"]

Named = Callable[..., Any]


def find(xp: Any, function: Any) -> Callable[..., Any]:
    """What the namespace `xp` calls the NumPy function `function`."""
    home = getattr(function, "__module__", None) or ""
    part = home.rpartition(".")[2]
    space = getattr(xp, part) if part in ("linalg", "fft") else xp
    name = function.__name__
    standard = _STANDARD.get(name, name)
    own = _FUNCTIONS.get(name if space is xp else f"{part}.{name}")
    return partial(own, xp) if own is not None else getattr(space, standard)


# NumPy's name -> the standard's.
_STANDARD = {
    "absolute": "abs",
    "amax": "max",
    "amin": "min",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "concatenate": "concat",
    "conjugate": "conj",
    "invert": "bitwise_invert",
    "left_shift": "bitwise_left_shift",
    "power": "pow",
    "right_shift": "bitwise_right_shift",
    "rint": "round",
    "true_divide": "divide",
}


def _transpose(xp: Any, x: Array, axes: Any = None) -> Array:
    return xp.permute_dims(x, tuple(range(x.ndim))[::-1] if axes is None else tuple(axes))


def _swapaxes(xp: Any, x: Array, first: int, second: int) -> Array:
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return xp.permute_dims(x, tuple(order))


def _dot(xp: Any, a: Array, b: Array) -> Array:
    if a.ndim == 0 or b.ndim == 0:
        return a * b
    return a @ b if b.ndim <= 2 else xp.tensordot(a, b, axes=((-1,), (-2,)))


def _inner(xp: Any, a: Array, b: Array) -> Array:
    return xp.tensordot(a, b, axes=((-1,), (-1,)))


def _ravel(xp: Any, x: Array) -> Array:
    return xp.reshape(x, (-1,))


def _cumsum(xp: Any, x: Array, axis: int | None = None) -> Array:
    return xp.cumulative_sum(x if axis is not None else xp.reshape(x, (-1,)), axis=-1 if axis is None else axis)


def _split(xp: Any, x: Array, parts: Any, axis: int = 0) -> list[Array]:
    axis %= x.ndim
    length = x.shape[axis]
    if isinstance(parts, int):
        if length % parts:
            message = f"split: {length} entries do not make {parts} equal parts"
            raise ValueError(message)
        parts = range(length // parts, length, length // parts)
    ends = [*parts, length]
    return [x[(*(slice(None),) * axis, slice(start, stop))] for start, stop in zip([0, *parts], ends, strict=True)]


def _norm(xp: Any, x: Array, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Array:
    matrix = ord is not None and (x.ndim == 2 if axis is None else isinstance(axis, tuple) and len(axis) == 2)
    if matrix and (axis is None or tuple(i % x.ndim for i in axis) == (x.ndim - 2, x.ndim - 1)):
        return xp.linalg.matrix_norm(x, ord=ord, keepdims=keepdims)
    return xp.linalg.vector_norm(x, ord=2 if ord is None else ord, axis=axis, keepdims=keepdims)


def _spread(name: str) -> Named:
    """`var` and `std` with NumPy's name for the correction."""

    def function(xp: Any, x: Array, axis: Any = None, *, ddof: float = 0.0, **options: Any) -> Array:
        return getattr(xp, name)(x, axis=axis, **{"correction": ddof} | options)

    return function


def _copy(xp: Any, x: Array) -> Array:
    return xp.positive(x)


_FUNCTIONS: dict[str, Named] = {
    "copy": _copy,
    "cumsum": _cumsum,
    "dot": _dot,
    "inner": _inner,
    "linalg.norm": _norm,
    "ravel": _ravel,
    "split": _split,
    "std": _spread("std"),
    "swapaxes": _swapaxes,
    "transpose": _transpose,
    "var": _spread("var"),
}


def _same(name: str) -> Named:
    return lambda xp, x, *arguments, **options: getattr(xp, name)(x, *arguments, **options)


def _with_lengths(xp: Any, x: Array, *shape: Any) -> Array:
    return xp.reshape(x, shape[0] if len(shape) == 1 else shape)


def _with_axes(xp: Any, x: Array, *axes: Any) -> Array:
    given = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None
    return _transpose(xp, x, given)


METHODS: dict[str, Named] = {
    name: _same(name)
    for name in (
        "all any argmax argmin argsort astype clip max mean min nonzero prod repeat round squeeze sum take"
    ).split()
} | {
    "conj": _same("conj"),
    "copy": _copy,
    "cumsum": _cumsum,
    "dot": _dot,
    "flatten": _ravel,
    "ravel": _ravel,
    "reshape": _with_lengths,
    "std": _spread("std"),
    "swapaxes": _swapaxes,
    "transpose": _with_axes,
    "var": _spread("var"),
}
