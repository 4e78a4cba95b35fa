"""Arrays that remember how they were made.

A traced array has the operators and attributes of an array. What it computes, it computes by a rule on plain arrays,
and adds a node to the graph. It carries its tape with it, so nothing is global and tapes cannot meet unnoticed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Never

from peftarray.arrays import Array, device
from peftarray.autodiff import numpy_names
from peftarray.autodiff.rules import FAMILIES, Rule
from peftarray.autodiff.tape import Node
from peftarray.errors import PeftError

__all__ = ["Traced", "is_traced", "plain", "record"]

_RULES = FAMILIES[""].rules
# type -> whether its arrays stand for others, and so take part by their own functions.
_STANDS_FOR_OTHERS: dict[type, bool] = {}


def record(rule: Rule, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The value of a rule on arguments of which at least one is traced, as a traced array.

    Returns:
        `NotImplemented` where an argument stands for others: its own type has to answer.

    Raises:
        PeftError: the arguments belong to two tapes.
    """
    tape: Any = None
    edges = []
    values = list(arguments)
    needs = [False] * len(values)
    for place, argument in enumerate(values):
        if isinstance(argument, Traced):
            node = argument.node
            if node.tape is not tape:
                if tape is not None:
                    _refuse_two_tapes(rule.name)
                tape = node.tape
            values[place] = argument.value
            needs[place] = True
            edges.append((place, node))
        else:
            kind = type(argument)
            stands = _STANDS_FOR_OTHERS.get(kind)
            if stands is None:
                stands = _STANDS_FOR_OTHERS[kind] = hasattr(kind, "__namespace_rank__")
            if stands:
                return NotImplemented
    value, pull = rule.function(tape.xp, needs, *values, **options)
    if pull is None:
        return value
    if type(value) is tuple:
        return _several(tape, edges, value, pull)
    return tape.traced(value, Node(tape, edges, pull, value.shape, value.dtype))


def _several(tape: Any, edges: list[tuple[int, Node]], values: tuple[Array, ...], pull: Any) -> tuple[Any, ...]:
    """One node that all values share, and for each value a node that says which it is."""
    n = len(values)
    shared = Node(tape, edges, lambda parts: pull([parts.get(i) for i in range(n)]), None, None)

    def traced(place: int, value: Array) -> Any:
        node = Node(tape, ((0, shared),), lambda g: ({place: g},), value.shape, value.dtype)
        return tape.traced(value, node)

    return tuple(traced(place, value) for place, value in enumerate(values))


def is_traced(value: Any) -> bool:
    """Whether a value is a traced array."""
    return isinstance(value, Traced)


def plain(value: Any) -> Any:
    """The plain array of a traced one; anything else as it is. Lists and tuples are looked through."""
    if isinstance(value, Traced):
        return value.value
    if type(value) in (list, tuple):
        return type(value)([plain(item) for item in value])
    return value


def _refuse_two_tapes(name: str) -> Never:
    message = (
        f"{name} got arrays of two different value_and_grad calls; pass outer arrays through stop_gradient, or "
        "differentiate once over all of them"
    )
    raise PeftError(message)


def _operator(name: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """An operator and its reflection."""
    rule = _RULES[name]

    def forward(self: Any, other: Any) -> Any:
        return record(rule, (self, other), {})

    def reflected(self: Any, other: Any) -> Any:
        return record(rule, (other, self), {})

    return forward, reflected


def _unary(name: str) -> Callable[[Any], Any]:
    rule = _RULES[name]
    return lambda self: record(rule, (self,), {})


def _constant(operate: Callable[[Any, Any], Any]) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """An operator whose value has no derivative, a plain array, and its reflection."""

    def forward(self: Any, other: Any) -> Any:
        return operate(self.value, plain(other))

    def reflected(self: Any, other: Any) -> Any:
        return operate(plain(other), self.value)

    return forward, reflected


def _refused(what: str) -> Callable[..., Never]:
    def refuse(self: Any, *_: Any, **__: Any) -> Never:
        message = f"a traced array {what}; take stop_gradient(x) where no gradient is wanted"
        raise PeftError(message)

    return refuse


class Traced:
    """An array with a node: abstract, since each library has its own kind (`space.traced_class`).

    Attributes:
        value: the plain array.
        node: how it was made.
    """

    __slots__ = ()  # each kind has `node` and `value`
    value: Array
    node: Node
    __namespace_rank__ = 3
    # Set in each library's kind.
    _namespace: Any = None

    def __init__(self, value: Array, node: Node) -> None:
        self.value = value
        self.node = node  # type: ignore[misc]

    def __array_namespace__(self, /, *, api_version: str | None = None) -> Any:
        return self._namespace

    def __stop_gradient__(self) -> Array:
        return self.value

    def __repr__(self) -> str:
        return f"Traced({self.value!r})"

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    device = property(lambda self: device(self.value))
    mT = property(_unary("matrix_transpose"))
    real, imag = property(_unary("real")), property(_unary("imag"))

    @property
    def T(self) -> Any:
        """The transpose of a matrix."""
        if self.ndim != 2:
            message = f"x.T is for matrices, and this has {self.ndim} axes; use x.mT or permute_dims"
            raise PeftError(message)
        return self.mT

    def to_device(self, target: Any, /, *, stream: Any = None) -> Any:
        """This array on another device; its gradient comes back."""
        return record(_RULES["to_device"], (self, target), {})

    __add__, __radd__ = _operator("add")
    __sub__, __rsub__ = _operator("subtract")
    __mul__, __rmul__ = _operator("multiply")
    __truediv__, __rtruediv__ = _operator("divide")
    __mod__, __rmod__ = _operator("remainder")
    __pow__, __rpow__ = _operator("pow")
    __matmul__, __rmatmul__ = _operator("matmul")
    __neg__, __pos__, __abs__ = _unary("negative"), _unary("positive"), _unary("abs")
    __lt__, __le__ = _constant(operator.lt)[0], _constant(operator.le)[0]
    __gt__, __ge__ = _constant(operator.gt)[0], _constant(operator.ge)[0]
    __eq__, __ne__ = _constant(operator.eq)[0], _constant(operator.ne)[0]
    __floordiv__, __rfloordiv__ = _constant(operator.floordiv)
    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Any:
        return record(_RULES["getitem"], (self, plain(key)), {})

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter(record(_RULES["unstack"], (self,), {}))

    __setitem__ = _refused("is not changed in place (use where or concat)")
    __array__ = _refused("does not turn into a NumPy array, which would lose its gradient")
    __bool__ = __float__ = __int__ = __complex__ = _refused(
        "does not turn into a Python number, which would lose its gradient"
    )
    __index__ = _refused("is no index")

    def __array_ufunc__(self, ufunc: Any, method: str, *arguments: Any, **options: Any) -> Any:
        """NumPy's functions on traced arrays are those of the tape's namespace."""
        if method != "__call__":
            message = f"numpy.{ufunc.__name__}.{method} has no derivative rule; use the function that does the same"
            raise PeftError(message)
        return numpy_names.find(self._namespace, ufunc)(*arguments, **options)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        return numpy_names.find(self._namespace, function)(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """NumPy's methods, for model code that calls them: `x.sum(-1)`, `x.reshape(2, 3)`."""
        method = numpy_names.METHODS.get(name)
        if method is None:
            message = f"a traced array has no attribute {name!r}"
            raise AttributeError(message)
        return partial(method, self._namespace, self)
