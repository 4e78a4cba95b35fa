"""Singular values of updates and the cut to a rank; of a product of thin factors without forming the matrix.

`up = Q R` and `down^T = P S` by QR, so the singular values of `up down` are those of the small `R S^T`, and its
singular vectors are that one's through Q and P (Golub and Van Loan, Matrix Computations, 2013, section 8.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from peftarray.arrays import Array, namespace, to_host
from peftarray.errors import NumberError

__all__ = ["Spectrum", "cut", "inner", "matrix_spectrum", "numerical_rank", "product_spectrum"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """`left @ diag(values) @ right`, with orthonormal columns of `left` and rows of `right`.

    The largest entry of each column of `left` by magnitude is positive, so that a decomposition can be repeated.

    Attributes:
        left: `(out, k)`.
        values: `(k,)`, the largest first.
        right: `(k, fan_in)`.
        rounding: singular values up to this size are not told from zero.
    """

    left: Array
    values: Array
    right: Array
    rounding: float

    @property
    def on_host(self) -> np.ndarray:
        """The singular values in float64, with zeros for what is rounding."""
        values = np.asarray(to_host(self.values), np.float64)
        return np.where(values > self.rounding, values, 0.0)


def product_spectrum(up: Array, down: Array) -> Spectrum:
    """The singular value decomposition of `up (out, r) @ down (r, fan_in)`."""
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return matrix_spectrum(up @ down)
    xp = namespace(up, down)
    left, upper = xp.linalg.qr(up)
    right, lower = xp.linalg.qr(down.mT)
    core = matrix_spectrum(upper @ lower.mT)
    # Where terms cancel, what is left of them is rounding of the factors, however small the product is.
    lengths = float(xp.linalg.matrix_norm(upper)) * float(xp.linalg.matrix_norm(lower))
    rounding = max(core.rounding, _precision(core.values) * lengths)
    return _signed(left @ core.left, core.values, core.right @ right.mT, rounding)


def matrix_spectrum(matrix: Array) -> Spectrum:
    """The singular value decomposition of a matrix.

    Raises:
        NumberError: it holds NaN or infinity.
    """
    xp = namespace(matrix)
    if not bool(xp.all(xp.isfinite(matrix))):
        message = (
            "an update holds NaN or infinity, so it has no singular values; the adapter is broken, or its scale is"
        )
        raise NumberError(message)
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    largest = float(np.max(to_host(values), initial=0.0))
    return _signed(left, values, right, _precision(values) * max(matrix.shape) * largest)


def cut(spectrum: Spectrum, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: the fewest that hold `energy`, at most `rank`.

    At least one, even of an update that is zero.
    """
    squares = np.square(spectrum.on_host)
    count = numerical_rank(spectrum)
    if energy is not None and energy < 1:
        # What is dropped is summed from the smallest, so that tiny values are not lost beside large ones.
        dropped = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        count = min(count, int(np.argmax(dropped <= (1 - energy) * squares.sum() * (1 + 1e-12))))
    if rank is not None:
        count = min(count, rank)
    return max(count, 1)


def numerical_rank(spectrum: Spectrum) -> int:
    """How many singular values are more than rounding."""
    return int(np.count_nonzero(spectrum.on_host))


def inner(one: tuple[Array, Array], other: tuple[Array, Array]) -> float:
    """The inner product of two updates that are given by factors; of one with itself, its squared norm."""
    xp = namespace(*one, *other)
    found = float(xp.sum((one[0].mT @ other[0]) * (one[1] @ other[1].mT)))
    if not math.isfinite(found):
        raise _not_finite()
    return found


def _not_finite() -> NumberError:
    message = "an update holds NaN or infinity; the adapter is broken, or its scale is"
    return NumberError(message)


def _precision(like: Array) -> float:
    return float(namespace(like).finfo(like.dtype).eps)


def _signed(left: Array, values: Array, right: Array, rounding: float) -> Spectrum:
    xp = namespace(left)
    high, low = xp.max(left, axis=0), xp.min(left, axis=0)
    one = xp.ones_like(high)
    sign = xp.where(high >= -low, one, -one)
    return Spectrum(left * sign, values, right * sign[:, None], rounding)
