"""array-api-strict: the array API standard and nothing else, to find what a formula asks beyond it.

Arrays lie on the library's second device unless told otherwise: they refuse every silent way to NumPy.
"""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
from peftarray.backends.by_tape import COMPILES, checkpoint, jit, linear_map, value_and_grad

from peftarray import arrays

__all__ = [
    "COMPILES",
    "SIDE_BY_SIDE",
    "checkpoint",
    "from_host",
    "jit",
    "linear_map",
    "random_state",
    "set_random_state",
    "to_host",
    "value_and_grad",
]

SIDE_BY_SIDE = True


def from_host(array: np.ndarray, *, device: str | array_api_strict.Device | None = None) -> Any:
    """An array with the values of `array` on one of the devices `"CPU_DEVICE"`, `"device1"` and `"device2"`."""
    place = device if isinstance(device, array_api_strict.Device) else array_api_strict.Device(device or "device1")
    return array_api_strict.asarray(array, device=place, copy=True)


def to_host(array: Any) -> np.ndarray:
    """A NumPy array with the values of a strict array."""
    return arrays.to_host(array)


def random_state() -> dict[str, Any]:
    """Nothing: the library has no generator."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Nothing."""
