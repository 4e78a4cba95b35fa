"""The normal distribution, which the standard lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftarray.arrays import Array

__all__ = ["normal"]

# What lies beyond s >= 0, by the density there, `(1 - Phi(s)) / density(s)`: for float32 a quotient of polynomials,
# lowest power first, with an error of 6e-8 in Phi, its rounding. For float64, `(s + sqrt(1 / 2))` times it is a
# polynomial in `(s - m) / (s + m)`, a Chebyshev series that is cut below the rounding (9e-16).
_ABOVE = (12.521316732714821, 5.399260654610075, 1.0174738611440517)
_BELOW = (9.990564113265714, 12.27938891189354, 5.613128104082588, 1.0)
_LONG = (
    1.1209336553266924, -0.1084358579548525, -0.08775821325073188, 0.13969587849368115, -0.09125217749389967,
    0.029033585760030244, 0.0008258684673728174, -0.0038835163507853127, 0.00043590510463582534, 0.0005602093054129598,
    -7.841484756486021e-05, -0.00010062222427854283, 5.561012218247206e-06, 2.0159952791093115e-05,
    2.2931119982310403e-06, -3.816112587279877e-06, -1.374467802092231e-06, 5.616231435456279e-07,
    4.407479426468675e-07, -4.498491876517712e-08, -9.023070996039711e-08, -2.3401624448422446e-10,
    9.24622737056529e-09,
)  # fmt: skip
_MIDDLE = 2.5 * math.sqrt(2)
# Beyond it the density is zero in float64 too, and the square must not overflow.
_LARGEST = 39.0
# For the quotient by which zero has no sign.
_TINY = 1e-30


def normal(xp: Any, x: Array) -> tuple[Array, Array]:
    """The standard normal distribution's function `Phi` and its density, to the rounding of their dtype.

    `Phi(x) = (1 + erf(x / sqrt(2))) / 2`. What lies beyond |x| is the density times a smooth function.

    Example:
        >>> import numpy as np
        >>> normal(np, np.asarray([-1.0, 0.0, 2.0]))[0].round(12).tolist()
        [0.158655253931, 0.5, 0.977249868052]
    """
    x = xp.clip(x, -_LARGEST, _LARGEST)
    size = xp.abs(x)
    density = xp.exp(size * size * -0.5) * (1 / math.sqrt(2 * math.pi))
    beyond = (_beyond_long if xp.finfo(x.dtype).bits > 32 else _beyond_short)(size)
    # The sign by a quotient: quicker than the library's own.
    return (0.5 - beyond * density) * (x / (size + _TINY)) + 0.5, density


def _beyond_short(size: Array) -> Array:
    return _polynomial(size, _ABOVE) / _polynomial(size, _BELOW)


def _beyond_long(size: Array) -> Array:
    return _polynomial((size - _MIDDLE) / (size + _MIDDLE), _LONG) / (size + math.sqrt(0.5))


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """By Horner's rule."""
    first, *rest = coefficients[::-1]
    total = x * first
    for coefficient in rest[:-1]:
        total += coefficient
        total *= x
    total += rest[-1]
    return total
