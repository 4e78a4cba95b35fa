"""Matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.rules.family import Family, Needs, Result, Wanted, conj
from peftarray.errors import PeftError

__all__ = ["PRODUCTS"]

PRODUCTS = Family()


@PRODUCTS.rule("matmul")
def _matmul(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    """With a matrix on the right, leading axes become rows of one product: half the time of a product for each."""
    if a.ndim == 1 or b.ndim == 1:
        return _with_vector(xp, needs, a, b)
    lead = a.shape[:-1]
    flat = b.ndim == 2 and a.ndim > 2
    if flat:
        a = xp.reshape(a, (-1, a.shape[-1]))
    value = a @ b
    if flat:
        value = xp.reshape(value, (*lead, b.shape[-1]))
    left, right = a if needs[1] else None, b if needs[0] else None

    def pull(g: Array) -> Wanted:
        if flat:
            g = xp.reshape(g, (-1, g.shape[-1]))
        to_a = None if right is None else g @ conj(xp, right).mT
        if flat and to_a is not None:
            to_a = xp.reshape(to_a, (*lead, to_a.shape[-1]))
        return to_a, None if left is None else conj(xp, left).mT @ g

    return value, pull


def _with_vector(xp: Any, needs: Needs, a: Array, b: Array) -> Result:
    wants_a, wants_b = needs

    def pull(g: Array) -> Wanted:
        # (k) is (1, k) on the left and (k, 1) on the right, and the axis of one is gone from the value.
        rows = a[None, :] if a.ndim == 1 else a
        columns = b[:, None] if b.ndim == 1 else b
        if a.ndim == 1:
            g = g[..., None, :] if b.ndim > 1 else g[None]
        if b.ndim == 1:
            g = g[..., None]
        to_a = g @ conj(xp, columns).mT if wants_a else None
        to_b = conj(xp, rows).mT @ g if wants_b else None
        return (
            to_a if to_a is None or a.ndim > 1 else to_a[..., 0, :],
            to_b if to_b is None or b.ndim > 1 else to_b[..., 0],
        )

    return a @ b, pull


@PRODUCTS.rule("vecdot")
def _vecdot(xp: Any, needs: Needs, a: Array, b: Array, /, *, axis: int = -1) -> Result:
    left, right = a if needs[1] else None, b if needs[0] else None

    def pull(g: Array) -> Wanted:
        g = xp.expand_dims(g, axis=axis)
        return None if right is None else conj(xp, g) * right, None if left is None else g * left

    return xp.vecdot(a, b, axis=axis), pull


@PRODUCTS.composition("tensordot")
def _tensordot(xp: Any, a: Array, b: Array, /, *, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Array:
    if isinstance(axes, int):
        axes = (range(a.ndim - axes, a.ndim), range(axes))
    of_a, of_b = (
        [i % x.ndim for i in ((side,) if isinstance(side, int) else side)] for x, side in zip((a, b), axes, strict=True)
    )
    free_a, free_b = ([i for i in range(x.ndim) if i not in gone] for x, gone in ((a, of_a), (b, of_b)))
    shape = (*(a.shape[i] for i in free_a), *(b.shape[i] for i in free_b))
    inner = math.prod(a.shape[i] for i in of_a)
    rows = xp.reshape(xp.permute_dims(a, (*free_a, *of_a)), (-1, inner))
    columns = xp.reshape(xp.permute_dims(b, (*of_b, *free_b)), (inner, -1))
    return xp.reshape(rows @ columns, shape)


@PRODUCTS.composition("outer")
def _outer(xp: Any, a: Array, b: Array, /) -> Array:
    return xp.reshape(a, (-1, 1)) * xp.reshape(b, (1, -1))


@PRODUCTS.rule("einsum")
def _einsum(xp: Any, needs: Needs, subscripts: str, /, *operands: Array, **options: Any) -> Result:
    """Einstein's sum, where the library has it. The standard has not; model code uses it."""
    terms, result = _subscripts(subscripts)
    sizes = {axis: n for term, x in zip(terms, operands, strict=True) for axis, n in zip(term, x.shape, strict=True)}

    def towards(place: int, g: Array) -> Array:
        term = terms[place]
        others = [(terms[i], conj(xp, x)) for i, x in enumerate(operands) if i != place]
        seen = set(result).union(*(other for other, _ in others))
        kept = "".join(axis for axis in term if axis in seen)
        spec = ",".join([result, *(other for other, _ in others)]) + "->" + kept
        made = xp.einsum(spec, g, *(x for _, x in others), **options)
        shape = tuple(sizes[axis] if axis in seen else 1 for axis in term)
        return xp.broadcast_to(xp.reshape(made, shape), tuple(sizes[axis] for axis in term))

    return (
        xp.einsum(subscripts, *operands, **options),
        lambda g: [None, *(towards(i, g) if wanted else None for i, wanted in enumerate(needs[1:]))],
    )


def _subscripts(text: str) -> tuple[list[str], str]:
    """The axes of each operand and of the result."""
    left, arrow, result = text.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in text or any(len(set(term)) < len(term) for term in terms):
        message = f"einsum({text!r}) has no derivative here: it has '...' or an axis twice in one operand; write it out"
        raise PeftError(message)
    if not arrow:
        result = "".join(sorted(axis for axis in set(left) - {","} if left.count(axis) == 1))
    return terms, result
