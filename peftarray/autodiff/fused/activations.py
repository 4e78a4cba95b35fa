"""Activations in as few passes over memory as they need: each beside its plain formula."""

from __future__ import annotations

import math
from typing import Any

from peftarray.arrays import Array, device, namespace
from peftarray.autodiff.fused.memory import into, tiles
from peftarray.autodiff.fused.normal import normal
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result, Wanted
from peftarray.errors import ConfigError

__all__ = ["gelu", "log_softmax", "silu_mul", "softmax"]

# Far beyond it exp overflows, and the sigmoid of its negative is zero to rounding.
_LARGEST_EXPONENT = 80.0
# Of GELU's approximation by tanh.
_INNER, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _silu_mul(gate: Array, up: Array) -> Array:
    """SiLU of a gate, times another projection: `gate sigmoid(gate) up`, the middle of a gated MLP.

    Args:
        gate, up: arrays of one shape.

    Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 6, arXiv:2002.05202.
    """
    xp = namespace(gate, up)
    return gate / (1 + xp.exp(-gate)) * up


@primitive(formula=_silu_mul)
def silu_mul(xp: Any, needs: Needs, gate: Array, up: Array) -> Result:
    value = xp.empty(gate.shape, dtype=gate.dtype, device=device(gate))
    for gate_, up_, value_ in tiles(xp, gate, up, value):
        into(value_, xp.divide, gate_, _one_and_exp(xp, gate_))
        value_ *= up_
    wants_gate, wants_up = needs

    def pull(g: Array) -> Wanted:
        # Its two arguments alone are kept: to compute the rest again is as quick as to read it.
        to_gate, to_up = (xp.empty(g.shape, dtype=g.dtype, device=device(g)) for _ in range(2))
        for g_, gate_, up_, to_gate_, silu_ in tiles(xp, g, gate, up, to_gate, to_up):
            n = _one_and_exp(xp, gate_)
            into(silu_, xp.divide, gate_, n)
            if wants_gate:  # the derivative of SiLU: silu + (1 - silu) / n
                into(to_gate_, xp.subtract, 1.0, silu_)
                to_gate_ /= n
                to_gate_ += silu_
                to_gate_ *= up_
                to_gate_ *= g_
            silu_ *= g_
        return to_gate if wants_gate else None, to_up if wants_up else None

    return value, pull


def _one_and_exp(xp: Any, gate: Array) -> Array:
    """`1 + exp(-gate)`, the inverse of the sigmoid."""
    n = -gate
    into(n, xp.minimum, n, _LARGEST_EXPONENT)
    into(n, xp.exp, n)
    n += 1.0
    return n


def _gelu(x: Array, *, approximate: str = "none") -> Array:
    """GELU: `x Phi(x)` with the normal distribution's Phi, or its approximation by tanh.

    Args:
        x: any shape.
        approximate: `"none"` or `"tanh"`.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2, arXiv:1606.08415.
    """
    xp = namespace(x)
    _check_approximate(approximate)
    if approximate == "tanh":
        return 0.5 * x * (1 + xp.tanh(_INNER * (x + _CUBIC * x**3)))
    return x * normal(xp, x)[0]


@primitive(formula=_gelu)
def gelu(xp: Any, needs: Needs, x: Array, *, approximate: str = "none") -> Result:
    _check_approximate(approximate)
    value = xp.empty(x.shape, dtype=x.dtype, device=device(x))
    slope = xp.empty(x.shape, dtype=x.dtype, device=device(x)) if needs[0] else value
    for x_, value_, slope_ in tiles(xp, x, value, slope):
        phi, derivative = (_phi_by_tanh if approximate == "tanh" else normal)(xp, x_)
        if needs[0]:
            derivative *= x_
            into(slope_, xp.add, derivative, phi)
        into(value_, xp.multiply, x_, phi)

    def pull(g: Array) -> Wanted:
        into(slope, xp.multiply, slope, g)
        return (slope,)

    return value, pull


def _phi_by_tanh(xp: Any, x: Array) -> tuple[Array, Array]:
    """`(1 + tanh(c (x + a x^3))) / 2` and its derivative."""
    square = x * x
    tanh = square * _CUBIC
    tanh += 1.0
    tanh *= x
    tanh *= _INNER
    into(tanh, xp.tanh, tanh)
    phi = tanh + 1.0
    phi *= 0.5
    square *= 3 * _CUBIC
    square += 1.0
    tanh *= tanh
    square -= square * tanh
    square *= 0.5 * _INNER
    return phi, square


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        message = f"gelu: approximate is {approximate!r}; it must be 'none' or 'tanh'"
        raise ConfigError(message)


def _softmax(x: Array, *, axis: int = -1) -> Array:
    """Exponentials that sum to one along an axis: `exp(x) / sum(exp(x))`.

    Example:
        >>> import numpy as np
        >>> softmax(np.zeros((2, 4)))[0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    xp = namespace(x)
    exponentials = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    return exponentials / xp.sum(exponentials, axis=axis, keepdims=True)


@primitive(formula=_softmax)
def softmax(xp: Any, needs: Needs, x: Array, *, axis: int = -1) -> Result:
    value = x - xp.max(x, axis=axis, keepdims=True)
    into(value, xp.exp, value)
    value /= xp.sum(value, axis=axis, keepdims=True)

    def pull(g: Array) -> Wanted:
        product = g * value
        product -= value * xp.sum(product, axis=axis, keepdims=True)
        return (product,)

    return value, pull


def _log_softmax(x: Array, *, axis: int = -1) -> Array:
    """The logarithm of the softmax: `x - log(sum(exp(x)))` along an axis."""
    xp = namespace(x)
    shifted = x - xp.max(x, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


@primitive(formula=_log_softmax)
def log_softmax(xp: Any, needs: Needs, x: Array, *, axis: int = -1) -> Result:
    value = x - xp.max(x, axis=axis, keepdims=True)
    value -= xp.log(xp.sum(xp.exp(value), axis=axis, keepdims=True))

    def pull(g: Array) -> Wanted:
        share = xp.exp(value)
        share *= xp.sum(g, axis=axis, keepdims=True)
        return (g - share,)

    return value, pull
