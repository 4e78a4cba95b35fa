"""Backends by name: what an array library does in its own way, found among the installed packages' entry points.

A backend is called after its library, and announced in the entry-point group `peftarray.backends`, so that another
package can bring one. `Backend` says what it has; `backends/__init__.py` says what it may do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, Literal, Protocol, cast

import numpy as np

from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError, nearest

__all__ = ["Backend", "backend_names", "backend_of", "backend_of_type", "load_backend"]

_GROUP = "peftarray.backends"


class Backend(Protocol):
    """What the module of a backend has. Trees are arrays in nested dicts, lists and tuples.

    A library with modules of its own may bring more: `adapt_module` and `load_module` for `get_peft_model` and
    `PeftModel.from_pretrained`, `as_trainable` for `fit`.
    """

    COMPILES: bool
    """Whether a training loop compiles unless it is told not to."""

    SIDE_BY_SIDE: bool
    """Whether threads of a training gain by working on several batches at once: most operations use one core."""

    def from_host(self, array: np.ndarray, *, device: Any = None) -> Array:
        """An array of the library with the values of `array`, on one of its devices; the default one if None."""

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of one of the library."""

    def value_and_grad(
        self,
        loss: Callable[..., Any],
        *,
        frozen: Collection[str] = (),
        has_aux: bool = False,
        unused: Literal["refuse", "zero"] = "refuse",
        compiled: bool = False,
    ) -> Callable[..., tuple[Any, Any]]:
        """A function of `(params, ...)` that gives `loss(params, ...)` and its gradient for every array in `params`.

        `peftarray.autodiff.value_and_grad` says what each argument means; `compiled` asks the library to compile it.
        """

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, keeping nothing for its gradient but its arguments: it is run again on the way back."""

    def linear_map(self, product: Callable[[Array], Array], transpose: Callable[[Array], Array], x: Array) -> Array:
        """`product(x)`, which is linear in `x`; the gradient for `x` is `transpose` of that of the value.

        Nothing but what the two functions read from around them is kept for the gradient.
        """

    def random_state(self) -> dict[str, Any]:
        """Where the library's own generators are, as a tree of NumPy arrays and numbers."""

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Put them back to there."""

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of trees, compiled where the library can; the function itself where it cannot."""


def load_backend(name: str) -> Backend:
    """The backend of a library, which is imported with it.

    Raises:
        ConfigError: nothing announces a backend of this name, or its library is not installed.

    Example:
        >>> load_backend("numpy").to_host([1.0]).tolist()
        [1.0]
    """
    points = _announced()
    if name not in points:
        message = f"there is no backend {name!r}; installed: {', '.join(_installed())}{nearest(name, points)}"
        raise ConfigError(message)
    try:
        return cast("Backend", points[name].load())
    except ImportError as error:
        message = (
            f"the backend {name!r} cannot be loaded ({error}); install its library, or choose one that is installed: "
            f"{', '.join(_installed())}"
        )
        raise ConfigError(message) from None


def backend_names() -> tuple[str, ...]:
    """The names of all backends that are announced, NumPy's first; their libraries need not be installed."""
    return tuple(sorted(_announced(), key=lambda name: (name != "numpy", name)))


def backend_of(*arrays: Array) -> str:
    """The name of the backend that arrays belong to: of the one that ranks highest, as in `namespace`.

    Raises:
        ConfigError: no backend is announced for their library.

    Example:
        >>> backend_of(np.ones(2))
        'numpy'
    """
    space = namespace(*arrays).__name__
    for part in space.split("."):  # array_api_compat.torch, jax.numpy
        if part in _announced():
            return part
    message = f"there is no backend for arrays of {space}; installed: {', '.join(_installed())}"
    raise ConfigError(message)


def backend_of_type(kind: type) -> str | None:
    """The name of the backend whose library defined a class or one of its bases; None where none did.

    Example:
        >>> backend_of_type(np.float32), backend_of_type(dict)
        ('numpy', None)
    """
    libraries = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((name for name in backend_names() if name in libraries), None)


@cache
def _announced() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=_GROUP)}


def _installed() -> list[str]:
    return [name for name in backend_names() if importlib.util.find_spec(name) is not None]
