"""CuPy: arrays from and to the host, by explicit copies, the only ones that CuPy makes; gradients from the tape."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
from peftarray.backends.by_tape import COMPILES, checkpoint, jit, linear_map, value_and_grad

from peftarray import arrays
from peftarray.errors import ConfigError

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

SIDE_BY_SIDE = False


def from_host(array: np.ndarray, *, device: int | str | None = None) -> Any:
    """An array with the values of `array` on the GPU of this number (`1`, `"cuda:1"`), the current one if None.

    Raises:
        ConfigError: there is no such GPU.
    """
    if isinstance(device, str):
        device = int(device.rpartition(":")[2])
    try:
        with cupy.cuda.Device(device):
            return cupy.asarray(array)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        message = f"device is {device!r}; CuPy cannot use it ({error}); choose a GPU that it finds, or another backend"
        raise ConfigError(message) from None


def to_host(array: Any) -> np.ndarray:
    """A NumPy array with the values of a CuPy array."""
    return arrays.to_host(array)


def random_state() -> dict[str, Any]:
    """Nothing: CuPy cannot tell where its own generator is."""
    return {}


def set_random_state(state: dict[str, Any]) -> None:
    """Nothing."""
