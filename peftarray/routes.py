"""Functions of the array libraries that an object in place of a weight answers without forming the weight.

One table, from the name of a function to how it is answered. NumPy, torch and the array API standard call one thing by
several names; each has its place here, whichever way the call came (operator, function, library's hook).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftarray.arrays import Array, namespace

if TYPE_CHECKING:
    from peftarray.stand_in import StandIn

__all__ = ["Weight", "answer"]

Arguments = tuple[Any, ...]
Options = Mapping[str, Any]


class Weight:
    """Marks an object that stands in for a weight; `peftarray.stand_in.StandIn` is the only kind."""


def answer(name: str, arguments: Arguments, options: Options) -> Any:
    """The value of the function called `name`, or `NotImplemented` where the weight itself must be formed."""
    found = _ROUTES.get(name)
    if found is None:
        return NotImplemented
    try:
        return found(*arguments, **options)
    except _NoRoute:
        return NotImplemented


class _NoRoute(Exception):
    """These arguments have no cheap way."""


def _weight(value: Any) -> StandIn:
    """The argument that a route is for."""
    if isinstance(value, Weight):
        return value  # type: ignore[return-value]
    raise _NoRoute


def _matmul(a: Any, b: Any, /, **options: Any) -> Array:
    _refuse_unless(not any(value is not None for value in options.values()))
    if isinstance(b, Weight):
        _refuse_unless(not isinstance(a, Weight))
        return _weight(b).after(a)
    # a b = (b^T a^T)^T
    w = _weight(a)
    return w.mT.after(b) if b.ndim == 1 else w.mT.after(b.mT).mT


def _reflected_matmul(b: Any, a: Any, /) -> Array:
    return _matmul(a, b)


def _dot(a: Any, b: Any, /, **options: Any) -> Array:
    _refuse_unless(min(a.ndim, b.ndim) > 0 and (isinstance(b, Weight) or b.ndim <= 2))
    return _matmul(a, b, **options)


def _inner(a: Any, b: Any, /) -> Array:
    return _weight(b).mT.after(a)


def _linear(input: Array, weight: Any, bias: Array | None = None) -> Array:
    y = _weight(weight).mT.after(input)
    return y if bias is None else y + bias


def _addmm(input: Array, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, **options: Any) -> Array:
    y = _matmul(mat1, mat2, **options)
    return (input if beta == 1 else beta * input) + (y if alpha == 1 else alpha * y)


def _tensordot(a: Any, b: Any, axes: Any = 2, *, dims: Any = None, out: None = None) -> Array:
    axes = axes if dims is None else dims
    w = _weight(b)
    _refuse_unless(not isinstance(a, Weight) and out is None)
    if axes == 1:
        return w.after(a)
    _refuse_unless(isinstance(axes, (list, tuple)) and len(axes) == 2)
    of_a, of_b = ([side] if isinstance(side, int) else list(side) for side in axes)
    _refuse_unless(len(of_a) == len(of_b) == 1 and of_a[0] in (-1, a.ndim - 1))
    return w.after(a) if of_b[0] % 2 == 0 else w.mT.after(a)


def _einsum(subscripts: str, /, *operands: Any, **options: Any) -> Array:
    """`...i,oi->...o` and its like: one axis of the weight is summed with the last of the other operand."""
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    _refuse_unless(isinstance(subscripts, str) and len(given) == 2 and set(options) <= {"optimize"})
    left, _, result = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    _refuse_unless(len(terms) == 2)
    (x, of_x), (weight, of_w) = sorted(zip(given, terms, strict=True), key=lambda pair: isinstance(pair[0], Weight))
    _refuse_unless(not isinstance(x, Weight) and len(of_w) == 2 and bool(of_x))
    lead, summed = of_x[:-1], of_x[-1]
    _refuse_unless(summed in of_w and summed not in lead and len(set(of_w)) == 2)
    kept = of_w.replace(summed, "")
    named = lead.replace("...", "")
    _refuse_unless(kept not in of_x and result == lead + kept and len(set(named)) == len(named))
    w = _weight(weight)
    return w.after(x) if of_w[0] == summed else w.mT.after(x)


def _take(a: Any, indices: Any, /, axis: int | None = None, **options: Any) -> Array:
    _refuse_unless(axis == 0 and not any(value not in (None, "raise") for value in options.values()))
    return _rows(_weight(a), indices)


def _index_select(input: Any, dim: int, index: Any) -> Array:
    _refuse_unless(dim == 0)
    return _rows(_weight(input), index)


def _getitem(a: Any, key: Any, /) -> Array:
    if isinstance(key, tuple) and len(key) == 2 and key[1] in (slice(None), Ellipsis):
        key = key[0]
    return _rows(_weight(a), key)


def _add(a: Any, b: Any, /, **options: Any) -> Array:
    _refuse_unless(not options and isinstance(a, Weight) != isinstance(b, Weight))
    found = _weight(a).plus(b) if isinstance(a, Weight) else _weight(b).plus(a)
    _refuse_unless(found is not NotImplemented)
    return found


def _reflected_add(b: Any, a: Any, /) -> Array:
    return _add(a, b)


def _embedding(input: Array, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Array:
    """The other arguments are of the weight's gradient, and the weight is frozen."""
    _refuse_unless(max_norm is None)
    return _rows(_weight(weight), input)


def _rows(w: StandIn, indices: Any) -> Array:
    """Rows of the weight by their numbers; boolean masks, slices and single numbers have no cheap way."""
    _refuse_unless(not isinstance(indices, (slice, tuple, list, int, type(None), type(Ellipsis))))
    _refuse_unless(namespace(indices).isdtype(indices.dtype, "integral"))
    found = w.rows(indices)
    _refuse_unless(found is not NotImplemented)
    return found


def _convolution(axes: int) -> Callable[..., Array]:
    def convolve(
        input: Array,
        weight: Any,
        bias: Array | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Array:
        _refuse_unless(not isinstance(padding, str) and input.ndim == axes + 2)
        y = _weight(weight).convolved(input, tuple(_numbers(n, axes) for n in (stride, padding, dilation)), groups)
        _refuse_unless(y is not NotImplemented)
        return y if bias is None else y + namespace(bias).reshape(bias, (-1, *(1 for _ in range(axes))))

    return convolve


def _numbers(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * count if len(found) == 1 else found


def _transpose(a: Any, *axes: Any, **named: Any) -> Any:
    """The same weight the other way round, under every name that this has."""
    w = _weight(a)
    given = (*axes, *named.values())
    order = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    _refuse_unless(w.ndim == 2 and (order in ((), (None,)) or sorted(i % 2 for i in order) == [0, 1]))
    # `transpose(1, 0)` and `swapaxes(0, 1)` turn it round; an order of (0, 1) given as such leaves it.
    return w if order is not given and list(order) == [0, 1] else w.mT


def _refuse_unless(condition: bool) -> None:
    if not condition:
        raise _NoRoute


_ROUTES: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "__add__": _add,
    "__matmul__": _matmul,
    "__radd__": _reflected_add,
    "__rmatmul__": _reflected_matmul,
    "add": _add,
    "addmm": _addmm,
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "conv3d": _convolution(3),
    "dot": _dot,
    "einsum": _einsum,
    "embedding": _embedding,
    "index_select": _index_select,
    "inner": _inner,
    "linear": _linear,
    "matmul": _matmul,
    "matrix_transpose": _transpose,
    "mm": _matmul,
    "permute": _transpose,
    "permute_dims": _transpose,
    "swapaxes": _transpose,
    "t": _transpose,
    "take": _take,
    "tensordot": _tensordot,
    "transpose": _transpose,
}
