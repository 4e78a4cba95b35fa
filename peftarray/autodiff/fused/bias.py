"""The bias of a linear layer, added to a product that nobody else holds."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.fused.memory import into
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result

__all__ = ["add_bias"]


def _add_bias(y: Array, bias: Array) -> Array:
    """`y + bias`. The caller gives `y` up: the sum may be made in its memory.

    Args:
        y: `(..., n)`, just made.
        bias: `(n,)`.
    """
    return y + bias


@primitive(formula=_add_bias)
def add_bias(xp: Any, needs: Needs, y: Array, bias: Array) -> Result:
    if y.dtype == bias.dtype and bias.ndim == 1:
        into(y, xp.add, y, bias)
    else:
        y = y + bias
    return y, lambda g: (g, g)
