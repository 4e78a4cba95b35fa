"""What backends share whose library brings no gradients and compiles nothing: the tape's, and functions as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["COMPILES", "checkpoint", "jit", "linear_map", "value_and_grad"]

COMPILES = False


def value_and_grad(
    loss: Callable[..., Any], *, compiled: bool = False, **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """As in `peftarray.backend.Backend`, by the tape; nothing is compiled."""
    from peftarray import autodiff  # most of what asks for such a backend trains nothing

    return autodiff.value_and_grad(loss, **options)


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, keeping nothing for its gradient but its arguments: it is run again on the way back."""
    from peftarray import autodiff

    return autodiff.checkpoint(function)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` itself."""
    return function


def linear_map(product: Callable[[Any], Any], transpose: Callable[[Any], Any], x: Any) -> Any:
    """`product(x)`; the tape has a rule for it, and asks here for plain arrays alone."""
    return product(x)
