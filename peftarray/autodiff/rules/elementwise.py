"""Elementwise functions. The walk sums a gradient down to a broadcast argument's shape, so the rules do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.rules.family import Family, Needs, Result, Wanted, conj
from peftarray.autodiff.tape import is_complex

__all__ = ["ELEMENTWISE"]

ELEMENTWISE = Family(
    constants=set(
        "bitwise_and bitwise_invert bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor ceil equal floor "
        "floor_divide greater greater_equal isfinite isinf isnan less less_equal logical_and logical_not logical_or "
        "logical_xor nextafter not_equal round sign signbit trunc".split()
    )
)

Derivative = Callable[[Any, Array, Array], Array]


def _through(name: str, derivative: Derivative, *, of_output: bool = False) -> None:
    """Declares `name` by its gradient, from (xp, g, x), or from (xp, g, y) where only the output is to be kept."""

    @ELEMENTWISE.rule(name)
    def rule(xp: Any, needs: Needs, x: Array, /) -> Result:
        y = getattr(xp, name)(x)
        # These functions are real on the real axis: the conjugate of f'(x) is f' at the conjugate.
        kept = conj(xp, y if of_output else x)
        return y, lambda g: (derivative(xp, g, kept),)


_OF_INPUT: dict[str, Derivative] = {
    "acos": lambda xp, g, x: -g / xp.sqrt(1 - x * x),
    "acosh": lambda xp, g, x: g / (xp.sqrt(x - 1) * xp.sqrt(x + 1)),
    "asin": lambda xp, g, x: g / xp.sqrt(1 - x * x),
    "asinh": lambda xp, g, x: g / xp.sqrt(x * x + 1),
    "atan": lambda xp, g, x: g / (x * x + 1),
    "atanh": lambda xp, g, x: g / (1 - x * x),
    "cos": lambda xp, g, x: -g * xp.sin(x),
    "cosh": lambda xp, g, x: g * xp.sinh(x),
    "log": lambda xp, g, x: g / x,
    "log10": lambda xp, g, x: g / (x * math.log(10)),
    "log1p": lambda xp, g, x: g / (x + 1),
    "log2": lambda xp, g, x: g / (x * math.log(2)),
    "sin": lambda xp, g, x: g * xp.cos(x),
    "sinh": lambda xp, g, x: g * xp.cosh(x),
    "square": lambda xp, g, x: g * x * 2,
}
_OF_OUTPUT: dict[str, Derivative] = {
    "exp": lambda xp, g, y: g * y,
    "expm1": lambda xp, g, y: g * (y + 1),
    "reciprocal": lambda xp, g, y: -g * y * y,
    "sqrt": lambda xp, g, y: g / (y * 2),
    "tan": lambda xp, g, y: g * (y * y + 1),
    "tanh": lambda xp, g, y: g * (1 - y * y),
}
for _name, _derivative in _OF_INPUT.items():
    _through(_name, _derivative)
for _name, _derivative in _OF_OUTPUT.items():
    _through(_name, _derivative, of_output=True)


@ELEMENTWISE.rule("abs")
def _abs(xp: Any, needs: Needs, x: Array, /) -> Result:
    return xp.abs(x), lambda g: (g * xp.sign(x),)


@ELEMENTWISE.rule("negative")
def _negative(xp: Any, needs: Needs, x: Array, /) -> Result:
    return -x, lambda g: (-g,)


@ELEMENTWISE.rule("positive")
def _positive(xp: Any, needs: Needs, x: Array, /) -> Result:
    return +x, lambda g: (g,)


@ELEMENTWISE.rule("conj")
def _conj(xp: Any, needs: Needs, x: Array, /) -> Result:
    return conj(xp, x), lambda g: (conj(xp, g),)


@ELEMENTWISE.rule("real")
def _real(xp: Any, needs: Needs, x: Array, /) -> Result:
    return (xp.real(x) if is_complex(x.dtype) else x), lambda g: (g,)


@ELEMENTWISE.rule("imag")
def _imag(xp: Any, needs: Needs, x: Array, /) -> Result:
    return xp.imag(x), lambda g: (g * 1j if is_complex(x.dtype) else None,)


@ELEMENTWISE.rule("add")
def _add(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    return a + b, _same_for_both


def _same_for_both(g: Array) -> Wanted:
    return g, g


@ELEMENTWISE.rule("subtract")
def _subtract(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    wants_b = needs[1]
    return a - b, lambda g: (g, -g if wants_b else None)


@ELEMENTWISE.rule("multiply")
def _multiply(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = a * b
    a, b = a if needs[1] else None, b if needs[0] else None
    return value, lambda g: (
        None if b is None else g * conj(xp, b),
        None if a is None else g * conj(xp, a),
    )


@ELEMENTWISE.rule("divide")
def _divide(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = a / b
    quotient = value if needs[1] else None

    def pull(g: Array) -> Wanted:
        over = g / conj(xp, b)
        return over, None if quotient is None else -over * conj(xp, quotient)

    return value, pull


@ELEMENTWISE.rule("pow")
def _pow(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = a**b
    kept = value if needs[1] else None
    wants_a = needs[0]

    def pull(g: Array) -> Wanted:
        return (
            g * conj(xp, _slope_of_power(xp, a, b)) if wants_a else None,
            None if kept is None else g * conj(xp, kept * _log_where_positive(xp, a)),
        )

    return value, pull


def _slope_of_power(xp: Any, a: Array, b: Array) -> Array:
    """`b a^(b-1)`, zero where b is zero, also at a = 0."""
    if isinstance(b, (int, float, complex)):
        if b == 0:
            return xp.zeros_like(a)
        return a * 2 if b == 2 else a ** (b - 1) * b
    return b * a ** xp.where(b == 0, 1, b - 1)


def _log_where_positive(xp: Any, a: Array) -> Array:
    """`log a`, zero at a = 0."""
    if isinstance(a, (int, float)):
        return math.log(a) if a > 0 else 0.0 if a == 0 else math.nan
    return xp.log(xp.where(a == 0, 1, a))


@ELEMENTWISE.rule("atan2")
def _atan2(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    def pull(g: Array) -> Wanted:
        over = g / (a * a + b * b)
        return over * b, -over * a

    return xp.atan2(a, b), pull


@ELEMENTWISE.rule("hypot")
def _hypot(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = xp.hypot(a, b)
    return value, lambda g: (g * a / value, g * b / value)


@ELEMENTWISE.rule("logaddexp")
def _logaddexp(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    value = xp.logaddexp(a, b)
    return value, lambda g: (g * xp.exp(a - value), g * xp.exp(b - value))


@ELEMENTWISE.rule("copysign")
def _copysign(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    return xp.copysign(a, b), lambda g: (xp.where(xp.signbit(a) == xp.signbit(b), g, -g), None)


@ELEMENTWISE.rule("remainder")
def _remainder(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    wants_b = needs[1]
    return a % b, lambda g: (g, -g * (a // b) if wants_b else None)


@ELEMENTWISE.rule("maximum")
def _maximum(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    return xp.maximum(a, b), _to_the_chosen(xp, needs, a > b, a < b)


@ELEMENTWISE.rule("minimum")
def _minimum(xp: Any, needs: Needs, a: Array, b: Array, /) -> Result:
    return xp.minimum(a, b), _to_the_chosen(xp, needs, a < b, a > b)


def _to_the_chosen(xp: Any, needs: Needs, first: Array, second: Array) -> Callable[[Array], Wanted]:
    """The gradient goes to the argument that was chosen, half to each where they are equal."""
    wants_first, wants_second = needs

    def share(g: Array, chosen: Array, other: Array) -> Array:
        return xp.where(chosen, g, xp.where(other, 0.0, g * 0.5))

    return lambda g: (
        share(g, first, second) if wants_first else None,
        share(g, second, first) if wants_second else None,
    )


@ELEMENTWISE.rule("clip")
def _clip(xp: Any, needs: Needs, x: Array, min: Array | None = None, max: Array | None = None) -> Result:
    # Names of the standard's. An entry on a bound counts as inside; where the bounds cross, the upper one holds.
    above = None if max is None else x > max
    below = None if min is None else x < min
    _, wants_min, wants_max = (*needs, False, False)[:3]

    def pull(g: Array) -> Wanted:
        inside, low, high = g, None, None
        if above is not None:
            high = xp.where(above, g, 0.0) if wants_max else None
            inside = xp.where(above, 0.0, inside)
        if below is not None:
            low = xp.where(below, inside, 0.0) if wants_min else None
            inside = xp.where(below, 0.0, inside)
        return inside, low, high

    return xp.clip(x, min, max), pull


@ELEMENTWISE.rule("where")
def _where(xp: Any, needs: Needs, condition: Array, a: Array, b: Array, /) -> Result:
    _, wants_a, wants_b = needs
    return xp.where(condition, a, b), lambda g: (
        None,
        xp.where(condition, g, 0.0) if wants_a else None,
        xp.where(condition, 0.0, g) if wants_b else None,
    )
