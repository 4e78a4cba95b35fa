"""Spherical interpolation between two updates: along the arc from one to the other, instead of the chord.

Source: Shoemake, Animating Rotation with Quaternion Curves, 1985, section 3.3; on updates seen as long vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["arc_weights"]

_PARALLEL = 1e-4
"""Below this sine of the angle the arc is the chord, or none is the shortest."""


def arc_weights(weights: Sequence[float], inner: float, norms: Sequence[float]) -> list[float]:
    """The factors of two updates at a point of the arc between them: `sin(w angle) / sin(angle)` for each weight `w`.

    The angle is that between the updates; their lengths are interpolated along. Where one is zero, or they are
    parallel, the point lies on the chord.

    Args:
        weights: `1 - t` and `t`.
        inner: the inner product of the updates.
        norms: their lengths.

    Example:
        >>> arc_weights([0.5, 0.5], 0.0, [1.0, 1.0])
        [0.7071067811865475, 0.7071067811865475]
    """
    length = norms[0] * norms[1]
    angle = math.acos(max(-1.0, min(1.0, inner / length))) if length else 0.0
    if math.sin(angle) < _PARALLEL:
        return list(weights)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]
