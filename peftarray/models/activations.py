"""Activations by the names that configurations give them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from peftarray.arrays import Array, namespace
from peftarray.autodiff.fused import gelu

__all__ = ["ACTIVATIONS"]


def _relu(x: Array) -> Array:
    # A product, where the standard's maximum takes no number: its derivative is the mask.
    xp = namespace(x)
    return x * xp.astype(x > 0, x.dtype)


def _silu(x: Array) -> Array:
    return x / (1 + namespace(x).exp(-x))


def _tanh(x: Array) -> Array:
    return namespace(x).tanh(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "relu": _relu,
    "silu": _silu,
    "tanh": _tanh,
}
