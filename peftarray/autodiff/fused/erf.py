"""The error function, which the standard lacks."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array

__all__ = ["erf"]

# exp(x^2) erfc(x) (1 + 2x) for x >= 0 as a polynomial in (x - 2.5) / (x + 2.5), lowest power first: Chebyshev series,
# cut where the error falls below the rounding of float32 (6e-8) and float64 (9e-16).
_SHORT = (
    1.264838055398216, -0.12235746577389316, -0.09901799967897873, 0.15764429480764594, -0.10302047418910294,
    0.03267757007045346, 0.0010865799622970988, -0.0041802466303208245, 0.0003035428554882583, 0.0004054889191726823,
)  # fmt: skip
_LONG = (
    1.2648381843668617, -0.12235676308238377, -0.09902453957365122, 0.15762991902137585, -0.10296705603621839,
    0.03276089331769906, 0.0009318927733445872, -0.004382078945300936, 0.0004918662389016548, 0.0006321285094410312,
    -8.848168038315855e-05, -0.00011354002162272001, 6.274930335033751e-06, 2.2748070739098505e-05,
    2.5874998066206678e-06, -4.30602194277757e-06, -1.5509208337244314e-06, 6.337238549355791e-07,
    4.973307964229331e-07, -5.076004516810985e-08, -1.0181445335154966e-07, -2.64059055037929e-10,
    1.0433250339174192e-08,
)  # fmt: skip


def erf(xp: Any, x: Array) -> Array:
    """The error function of real numbers, to the rounding of their dtype.

    Example:
        >>> import numpy as np
        >>> erf(np, np.asarray([-0.5, 1.0, 2.0])).round(12).tolist()
        [-0.520499877813, 0.84270079295, 0.995322265019]
    """
    # Beyond 27 the exponential is zero in float64 too, and the square must not overflow.
    size = xp.minimum(xp.abs(x), 27.0)
    t = (size - 2.5) / (size + 2.5)
    first, *rest = (_LONG if xp.finfo(x.dtype).bits > 32 else _SHORT)[::-1]
    total = t * first
    for coefficient in rest[:-1]:
        total += coefficient
        total *= t
    total += rest[-1]
    total /= size * 2 + 1
    total *= xp.exp(size * -size)
    return xp.sign(x) * (1 - total)
