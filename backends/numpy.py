"""NumPy: arrays to and from the host are the arrays themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from peftarray.errors import ConfigError

__all__ = ["from_host", "to_host"]


def from_host(array: np.ndarray, *, device: str | None = None) -> np.ndarray:
    """The array itself; there is no device but the host."""
    if device not in (None, "cpu"):
        message = f"device is {device!r}; NumPy has 'cpu' alone; choose another backend for a device"
        raise ConfigError(message)
    return array


def to_host(array: Any) -> np.ndarray:
    """The array itself."""
    return np.asarray(array)
