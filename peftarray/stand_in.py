"""Objects that stand in for a weight: model code computes with them as with the array, and never notices.

A product with the weight, or rows of it, take the cheap way of `peftarray.routes`; any other function of any library
forms the weight, and counts that. What a library does without asking its arguments is an error, never a wrong value: to
NumPy's, torch's and JAX's type checks these objects are no arrays.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Never, Self, TypeVar

from peftarray.arrays import Array, device, namespace, register_branch
from peftarray.errors import UnsupportedError
from peftarray.routes import Weight, answer

if TYPE_CHECKING:
    from peftarray.method import AdapterConfig

__all__ = ["Namespace", "OverArray", "StandIn", "kind_for"]

# Methods of arrays that make a new array or number, by which model code treats weights.
_METHODS = frozenset(
    "abs all any astype bfloat16 clone contiguous copy detach double flatten float get half item max mean min norm "
    "numpy prod ravel repeat reshape squeeze std sum to to_device tolist type unsqueeze var view".split()
)


def _materialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on the weight itself."""

    def operate(self: Any, *others: Any) -> Any:
        return function(self.dense(), *map(_dense, others))

    return operate


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: function(_dense(other), self.dense())


def _in_place(self: Any, *_: Any) -> Never:
    message = "an adapted weight is not changed in place; change the adapter's parameters, or the base before adapting"
    raise UnsupportedError(message)


class StandIn(Weight):
    """An object in place of a weight. Abstract; `kind_for` gives the kind that a library's operators let answer.

    The weight is `(n, m)`, or `(out, in, *kernel)` of a convolution. A subclass keeps no formed weight: it forms one
    when asked, so that it is right whatever became of its parameters.
    """

    __namespace_rank__: ClassVar[int] = 2
    # Set in each library's kind.
    _namespace: ClassVar[Any] = None
    _abstract: ClassVar[Any] = None

    # What a subclass defines.

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """What its numbers count as."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """Where the weight lies."""

    @abstractmethod
    def dense(self) -> Array:
        """The weight itself, formed now."""

    @property
    @abstractmethod
    def mT(self) -> Self:
        """The same weight the other way round; no arithmetic."""

    @abstractmethod
    def after(self, x: Array) -> Array:
        """`x @ self`, for `x (..., n)`."""

    def rows(self, indices: Array) -> Array:
        """`self[indices]` for an array of row numbers, or `NotImplemented`."""
        return NotImplemented

    def convolved(self, x: Array, window: tuple[tuple[int, ...], ...], groups: int) -> Array:
        """The convolution of `x` with this kernel and (stride, padding, dilation), or `NotImplemented`."""
        return NotImplemented

    def plus(self, x: Array) -> Array:
        """`x + self`, or `NotImplemented`."""
        return NotImplemented

    def kept(self, keep: Callable[[AdapterConfig], bool]) -> Array:
        """The weight with those adapters alone whose method this says yes to."""
        return self

    @abstractmethod
    def flatten(self) -> tuple[tuple[Array, ...], Any]:
        """The arrays that it is made of, and the rest: hashable, and enough for `unflatten`."""

    @classmethod
    @abstractmethod
    def unflatten(cls, rest: Any, arrays: Sequence[Array]) -> Self:
        """The inverse of `flatten`, with whatever stands for the arrays."""

    # What every array has.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many entries it has."""
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def T(self) -> Any:
        """The transpose of a matrix; of more axes, what the library makes of it."""
        return self.mT if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        """torch's transpose."""
        return self.T

    def transpose(self, *axes: Any) -> Any:
        """NumPy's and torch's method."""
        found = answer("transpose", (self, *axes), {})
        return self.dense().transpose(*axes) if found is NotImplemented else found

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Any) -> Array:
        return self._call("matmul", operator.matmul, (self, other), {})

    def __rmatmul__(self, other: Any) -> Array:
        return self._call("matmul", operator.matmul, (other, self), {})

    def __getitem__(self, key: Any) -> Array:
        return self._call("__getitem__", operator.getitem, (self, key), {})

    def __iter__(self) -> Iterator[Array]:
        return iter(self.dense())

    def __add__(self, other: Any) -> Array:
        return self._call("add", operator.add, (self, other), {})

    def __radd__(self, other: Any) -> Array:
        return self._call("add", operator.add, (other, self), {})

    __sub__, __rsub__ = _materialised(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _materialised(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _materialised(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _materialised(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _materialised(operator.mod), _reflected(operator.mod)
    __pow__, __rpow__ = _materialised(operator.pow), _reflected(operator.pow)
    __neg__, __pos__, __abs__ = _materialised(operator.neg), _materialised(operator.pos), _materialised(operator.abs)
    __lt__, __le__ = _materialised(operator.lt), _materialised(operator.le)
    __gt__, __ge__ = _materialised(operator.gt), _materialised(operator.ge)
    __eq__, __ne__ = _materialised(operator.eq), _materialised(operator.ne)
    __hash__ = object.__hash__
    __bool__, __float__, __int__ = _materialised(bool), _materialised(float), _materialised(int)
    __setitem__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = __imatmul__ = __ipow__ = _in_place
    __ifloordiv__ = __imod__ = _in_place

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.asarray(self.dense(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        """Methods that make something new, of the formed weight."""
        if name not in _METHODS:
            message = (
                f"an adapted weight has no attribute {name!r}; where a function needs the array itself, give it "
                "model.effective_weights()"
            )
            raise AttributeError(message)
        return getattr(self.dense(), name)

    # How the libraries ask.

    def __tree_items__(self) -> Iterator[tuple[str, Array]]:
        return ((str(place), array) for place, array in enumerate(self.flatten()[0]))

    def __tree_refill__(self, arrays: Sequence[Any]) -> Self:
        known = [array for array in arrays if hasattr(array, "dtype")]
        kind = kind_for(self._abstract, *known) if known else type(self)
        return kind.unflatten(self.flatten()[1], arrays)

    def __array_namespace__(self, /, *, api_version: str | None = None) -> Any:
        return self._namespace

    def __array_ufunc__(self, ufunc: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "at" or any(isinstance(target, StandIn) for target in options.get("out", ())):
            _in_place(self)
        if method == "__call__":
            return self._call(ufunc.__name__, ufunc, arguments, options)
        return getattr(ufunc, method)(*map(_dense, arguments), **options)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        if function.__name__ in ("copyto", "fill_diagonal", "place", "put", "put_along_axis", "putmask") and isinstance(
            arguments[0], StandIn
        ):
            _in_place(self)
        return self._call(function.__name__, function, arguments, options)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(function.__name__)  # by `str`, torch's compiler knows it for a string
        if name.endswith("_") and not name.endswith("__") and any(isinstance(a, StandIn) for a in arguments[:1]):
            _in_place(arguments[0])
        return cls._call(name, function, arguments, options or {})

    @staticmethod
    def _call(name: str, function: Callable[..., Any], arguments: Any, options: Any) -> Any:
        """The cheap way where there is one, and otherwise the function on weights that are formed now."""
        if isinstance(options.get("out"), StandIn):
            _in_place(None)
        found = answer(name, arguments, options)
        if found is not NotImplemented:
            return found
        return function(*map(_dense, arguments), **{key: _dense(value) for key, value in options.items()})


class OverArray(StandIn):
    """A stand-in over one frozen array, as that is stored or the other way round. Abstract.

    Attributes:
        base: the array.
    """

    base: Array
    _flipped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.base.shape)
        return shape[::-1] if self._flipped else shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def device(self) -> Any:
        return device(self.base)


def _dense(value: Any) -> Any:
    """What stands in for a weight, as the weight; lists, tuples and dicts are looked through."""
    if isinstance(value, StandIn):
        return value.dense()
    if type(value) in (list, tuple):
        return type(value)(map(_dense, value))
    return {key: _dense(item) for key, item in value.items()} if type(value) is dict else value


class Namespace:
    """A library's namespace, whose functions take what stands in for weights. It carries the library's name.

    Example:
        >>> import numpy as np
        >>> Namespace(np).matmul(np.eye(2), np.ones((2, 1))).tolist()
        [[1.0], [1.0]]
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.__name__ = inner.__name__

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if isinstance(found, ModuleType):
            found = Namespace(found)
        elif callable(found) and not isinstance(found, type):
            found = _asking(name, found)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return dir(self._inner)


def _asking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return StandIn._call(name, function, arguments, options)

    return call


Kind = TypeVar("Kind", bound=StandIn)
# (kind, type of the arrays beneath) -> the kind for their library.
_KINDS: dict[tuple[Any, ...], Any] = {}


def kind_for(kind: type[Kind], *arrays: Array) -> type[Kind]:
    """The kind of stand-in over arrays of a library: the one that its operators let answer.

    Args:
        kind: what is wanted.
        *arrays: all that it is made of; the one that ranks highest decides.
    """
    key = (kind, *dict.fromkeys(type(array) for array in arrays))
    found = _KINDS.get(key)
    if found is None:
        found = _KINDS[key] = _kind_over(kind, namespace(*arrays))
    return found


def _kind_over(kind: type[Kind], inner: Any) -> type[Kind]:
    key = (kind, inner)
    if key not in _KINDS:
        sample = inner.zeros((1, 1))
        members: dict[str, Any] = {"_namespace": Namespace(inner), "_abstract": kind, "__module__": kind.__module__}
        bases: tuple[type, ...] = (kind,)
        if not _lets_answer(sample, _Stranger()):
            # NumPy's word for "the other operand answers", which CuPy keeps as well.
            members["__array_ufunc__"] = None
            if not _lets_answer(sample, _Outranking()):
                # Python asks a subclass first, even where the library would refuse a stranger.
                bases = (kind, type(sample))
                members["__new__"] = lambda cls, *_, **__: object.__new__(cls)
        made: Any = type(f"{kind.__name__}[{inner.__name__}]", bases, members)
        _KINDS[key] = made
        register_branch(made, sample, made.flatten, made.unflatten)
    return _KINDS[key]


class _Stranger:
    """Says whether it was asked."""

    def __rmatmul__(self, other: Any) -> bool:
        return True

    def __array_ufunc__(self, *_: Any, **__: Any) -> bool:
        return True


class _Outranking(_Stranger):
    __array_ufunc__ = None  # type: ignore[assignment]


def _lets_answer(sample: Array, other: Any) -> bool:
    try:
        return (sample @ other) is True
    except Exception:  # each library has its own word for a stranger
        return False
