"""The array API namespace over traced arrays, and the kind of traced array that each library needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from peftarray.autodiff.rules import FAMILIES, Rule
from peftarray.autodiff.tape import Tape
from peftarray.autodiff.traced import Traced, is_traced, plain, record
from peftarray.errors import PeftError

__all__ = ["Namespace", "namespace_over", "new_tape", "traced_class"]


class Namespace:
    """Every function of an array library, with a derivative where an argument is traced.

    Where none is, the library's own function runs. Functions are made when they are first asked for.

    Example:
        >>> import numpy as np
        >>> xp = namespace_over(np)
        >>> xp.exp(np.zeros(2)), xp.linalg.__name__
        (array([1., 1.]), 'traced(numpy).linalg')
    """

    def __init__(self, inner: Any, part: str = "") -> None:
        self._inner = getattr(inner, part) if part else inner
        self._root = namespace_over(inner) if part else self
        self._family = FAMILIES[part]
        self._whole = inner
        self.__name__ = f"traced({inner.__name__})" + (f".{part}" if part else "")

    def __repr__(self) -> str:
        return f"<namespace {self.__name__}>"

    def __getattr__(self, name: str) -> Any:
        found = self._find(name)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return dir(self._inner)

    def _find(self, name: str) -> Any:
        family = self._family
        if name in FAMILIES and self._root is self:
            return Namespace(self._whole, name)
        if name.startswith("_") and name in family.rules:
            return _traced_only(family.rules[name])
        beneath = getattr(self._inner, name)
        if isinstance(beneath, (type, ModuleType)) or not callable(beneath):
            return beneath
        if name in family.rules:
            return _with_rule(family.rules[name], beneath)
        if name in family.composed:
            return _composed(family.composed[name], self._root, beneath)
        if name in family.constants:
            return _without_derivative(beneath)
        return _unless_traced(f"{self.__name__}.{name}", beneath)


@cache
def namespace_over(inner: Any) -> Namespace:
    """The namespace that traces over the library's own namespace `inner`."""
    return Namespace(inner)


@cache
def traced_class(inner: Any) -> type[Traced]:
    """The kind of traced array for a library, so that its operators let ours answer, whichever side it stands on."""
    sample = inner.asarray(0.0)
    members: dict[str, Any] = {"__slots__": ("node", "value"), "_namespace": namespace_over(inner)}
    bases: tuple[type, ...] = (Traced,)
    if not _dispatches_ufuncs(inner):
        # NumPy's word for "the other operand answers", which CuPy keeps as well.
        members["__array_ufunc__"] = None
    if not _defers(sample):
        # Python asks a subclass first, even where the library would refuse a stranger.
        bases = (Traced, type(sample))
        members["__new__"] = lambda cls, *_: object.__new__(cls)
    return type(f"Traced[{inner.__name__}]", bases, members)


def new_tape(inner: Any) -> Tape:
    """A tape over a library's own namespace."""
    return Tape(inner, traced_class(inner))


def _dispatches_ufuncs(inner: Any) -> bool:
    """Whether the library's functions ask their arguments, as NumPy's do."""
    return inner.exp is np.exp


def _defers(sample: Any) -> bool:
    """Whether the library's arrays let a stranger on their right answer."""

    class Stranger:
        __array_ufunc__ = None

        def __radd__(self, other: Any) -> bool:
            return True

    try:
        return sample + Stranger() is True
    except TypeError:
        return False


def _any_traced(arguments: Iterable[Any], options: dict[str, Any]) -> bool:
    return any(map(is_traced, arguments)) or any(map(is_traced, options.values()))


def _with_rule(rule: Rule, beneath: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        given = arguments
        if rule.spread:  # what follows the sequence is the axis
            given, options = tuple(arguments[0]), dict(zip(("axis",), arguments[1:], strict=False)) | options
        if not _any_traced(given, options):
            return beneath(*arguments, **options)
        if options:
            given, options = rule.bind(given, options)
        result = record(rule, given, options)
        return _by_who_stands_for_others(rule, given, options) if result is NotImplemented else result

    return function


def _by_who_stands_for_others(rule: Rule, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The function of the same name where an argument that is no array at all has its own."""
    standing = next(a for a in arguments if hasattr(type(a), "__namespace_rank__") and not is_traced(a))
    function = getattr(standing.__array_namespace__(), rule.name)
    return function(list(arguments), **options) if rule.spread else function(*arguments, **options)


def _traced_only(rule: Rule) -> Callable[..., Any]:
    return lambda *arguments, **options: record(rule, arguments, options)


def _composed(formula: Callable[..., Any], xp: Any, beneath: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        if not _any_traced(arguments, options):
            return beneath(*arguments, **options)
        return formula(xp, *arguments, **options)

    return function


def _without_derivative(beneath: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        return beneath(*map(plain, arguments), **{name: plain(value) for name, value in options.items()})

    return function


def _unless_traced(name: str, beneath: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        nested = [item for value in arguments if isinstance(value, (list, tuple)) for item in value]
        if _any_traced((*arguments, *nested), options):
            message = f"{name} has no derivative rule; write it with functions that have one, or declare a primitive"
            raise PeftError(message)
        return beneath(*arguments, **options)

    return function
