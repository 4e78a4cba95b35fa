"""How the derivatives of a family of functions are declared.

A *rule* is `f(xp, needs, *arguments, **options) -> (value, pull)`. `xp` is the library's own namespace and the
arguments are its plain arrays; `needs` says of each argument whether its gradient is wanted, so that a rule saves only
what the wanted ones read. `pull(g)` takes the gradient of the value and gives one for each argument, None where none is
wanted. It runs once, and never writes into `g`. Where `pull` is None, the value has no derivative. A rule with several
values gives a tuple of them, and its `pull` takes a list with None for those that nothing depends on.

With complex numbers z = x + iy, the gradient of a real loss is dL/dx + i dL/dy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.tape import Pull, is_complex

__all__ = ["Family", "Needs", "Result", "Rule", "Wanted", "conj"]

_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

Needs = Sequence[bool]
Wanted = Sequence[Array | None]
Result = tuple[Any, Pull | None]


class Rule:
    """The derivative of one function.

    Attributes:
        name: the function's.
        function: `f(xp, needs, *arguments, **options) -> (value, pull)`.
        spread: the function takes its arrays in one sequence, the rule one by one.
    """

    __slots__ = ("_defaults", "_names", "function", "name", "spread")

    def __init__(self, name: str, function: Callable[..., Result], *, spread: bool = False) -> None:
        self.name = name
        self.function = function
        self.spread = spread
        places = [p for p in signature(function).parameters.values() if p.kind in _BY_PLACE][2:]
        self._names = [p.name for p in places]
        self._defaults = {p.name: p.default for p in places if p.default is not p.empty}

    def bind(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that were given by name, in their places: `needs` speaks of places."""
        last = max((i for i, name in enumerate(self._names) if name in options), default=-1)
        between = self._names[len(arguments) : last + 1]
        given = self._defaults | options
        if not between or any(name not in given for name in between):  # the function itself says what it lacks
            return arguments, options
        rest = {name: value for name, value in options.items() if name not in between}
        return (*arguments, *(given[name] for name in between)), rest


@dataclass(frozen=True, slots=True)
class Family:
    """Functions that belong together.

    Attributes:
        rules: those with a derivative of their own.
        composed: those written with others: `f(xp, *arguments)`, where `xp` can trace.
        constants: those whose derivative is zero or has no meaning: they see plain arrays.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    composed: dict[str, Callable[..., Any]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)

    def rule(self, name: str, *, spread: bool = False) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
        """Declares the rule of the function called `name`."""

        def declare(function: Callable[..., Result]) -> Callable[..., Result]:
            self.rules[name] = Rule(name, function, spread=spread)
            return function

        return declare

    def composition(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declares the function called `name` as written with others."""

        def declare(function: Callable[..., Any]) -> Callable[..., Any]:
            self.composed[name] = function
            return function

        return declare

    def with_(self, *others: Family) -> Family:
        """This family and others, as one."""
        whole = Family()
        for family in (self, *others):
            whole.rules.update(family.rules)
            whole.composed.update(family.composed)
            whole.constants.update(family.constants)
        return whole


def conj(xp: Any, value: Any) -> Any:
    """The complex conjugate of an array or a Python number; a real array is given back as it is."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return value.conjugate()
    return xp.conj(value) if is_complex(dtype) else value
