"""Functions that bring their own derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from inspect import signature
from typing import Any, overload

from peftarray.arrays import namespace
from peftarray.autodiff.rules import Result, Rule
from peftarray.autodiff.traced import is_traced, record
from peftarray.errors import PeftError

__all__ = ["Primitive", "primitive"]


class Primitive:
    """A function with a rule of its own; `primitive` makes it.

    Attributes:
        rule: value and derivative.
        formula: the same function written plainly, where there is one.
    """

    def __init__(self, function: Callable[..., Result], formula: Callable[..., Any] | None) -> None:
        update_wrapper(self, formula or function)
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.rule = Rule(self.__name__, function)
        self.formula = formula
        if formula is not None:
            self.__signature__ = signature(formula)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        arguments, options = self.rule.bind(arguments, options)
        if any(map(is_traced, arguments)):
            result = record(self.rule, arguments, options)
            if result is not NotImplemented:
                return result
        else:
            xp = namespace(*filter(_is_array, arguments))
            if self.formula is None or _writes(xp):
                return self.rule.function(xp, (False,) * len(arguments), *arguments, **options)[0]
        # Only the formula can do it: another autograd follows it, or an argument stands for other arrays.
        if self.formula is None:
            message = f"{self.__name__} has no formula, so no argument may stand for other arrays; form the array first"
            raise PeftError(message)
        return self.formula(*arguments, **options)


@overload
def primitive(function: Callable[..., Result], /) -> Primitive: ...
@overload
def primitive(*, formula: Callable[..., Any]) -> Callable[[Callable[..., Result]], Primitive]: ...
def primitive(function: Callable[..., Result] | None = None, /, *, formula: Callable[..., Any] | None = None) -> Any:
    """A function with a derivative of its own, from a rule `f(xp, needs, *arguments, **options) -> (value, pull)`.

    Args:
        function: the rule, on plain arrays of the library whose namespace is `xp`. `needs` says of each argument
            whether its gradient is wanted: save what the wanted ones read. `pull(g)` takes the gradient of the value
            and gives one for each argument, None where none is wanted. It runs once, may overwrite what it saved, and
            never writes into `g`.
        formula: the same function of the arguments alone, written with functions that have derivatives. It runs on
            arrays of libraries with an autograd of their own, and on arguments that stand for other arrays.

    Returns:
        A function of `*arguments, **options`, on traced arrays and on plain ones.

    Example:
        >>> import numpy as np
        >>> from peftarray.autodiff import value_and_grad
        >>> @primitive
        ... def cube(xp, needs, x):
        ...     return x**3, lambda g: (g * 3 * x**2,)
        >>> cube(np.asarray([2.0])), value_and_grad(lambda x: np.sum(cube(x)), np.asarray([2.0]))[1]
        (array([8.]), array([12.]))
    """
    if function is None:
        return lambda rule: Primitive(rule, formula)
    return Primitive(function, formula)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype")


def _writes(xp: Any) -> bool:
    """Whether the library's functions are ufuncs, which write into given arrays; it then has no autograd of its own."""
    return hasattr(xp.exp, "nin")
