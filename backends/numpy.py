"""NumPy: arrays to and from the host are the arrays themselves, and gradients come from the tape."""

from __future__ import annotations

from typing import Any

import numpy as np
from peftarray.backends.by_tape import COMPILES, checkpoint, jit, linear_map, value_and_grad

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

SIDE_BY_SIDE = True


def from_host(array: np.ndarray, *, device: str | None = None) -> np.ndarray:
    """The array itself; there is no device but the host."""
    if device not in (None, "cpu"):
        message = f"device is {device!r}; NumPy has 'cpu' alone; choose another backend for a device"
        raise ConfigError(message)
    return array


def to_host(array: Any) -> np.ndarray:
    """The array itself."""
    return np.asarray(array)


def random_state() -> dict[str, Any]:
    """Where NumPy's own generator is, which a loss may draw from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {"kind": kind, "keys": keys, "rest": rest}


def set_random_state(state: dict[str, Any]) -> None:
    """Put NumPy's own generator back to where it was."""
    np.random.set_state((state["kind"], state["keys"], *state["rest"]))  # noqa: NPY002
