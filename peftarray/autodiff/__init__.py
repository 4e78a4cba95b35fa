"""Reverse-mode differentiation that is an array API namespace over another library's: NumPy, CuPy and their like.

Code that is written against the standard, or with NumPy's own functions, runs on traced arrays unchanged:

    >>> import numpy as np
    >>> from peftarray.autodiff import value_and_grad
    >>> value, gradient = value_and_grad(lambda x: np.sum(np.sin(x) ** 2))(np.asarray([0.0, np.pi / 4]))
    >>> gradient.round(6).tolist()
    [0.0, 1.0]

torch and JAX have derivatives of their own; the fused functions here run on their arrays too, by plain formulas.
"""

from __future__ import annotations

from peftarray.arrays import stop_gradient
from peftarray.autodiff.checkpoint import checkpoint
from peftarray.autodiff.gradient import value_and_grad
from peftarray.autodiff.primitive import primitive

__all__ = ["checkpoint", "primitive", "stop_gradient", "value_and_grad"]
