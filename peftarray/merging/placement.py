"""Where a merge computes its updates: on the host by NumPy, or by another array library on a device of its choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peftarray.arrays import Array
from peftarray.errors import ConfigError, PeftError, UnsupportedError

__all__ = ["HOST", "Placement", "placement"]


@dataclass(frozen=True)
class Placement:
    """A library and a device.

    Attributes:
        name: of the backend, and of the device where one was asked for.
        put: host values as an array there, of the same dtype.
        get: an array's values on the host.
    """

    name: str
    put: Callable[[np.ndarray], Array]
    get: Callable[[Array], np.ndarray]


def _itself(array: np.ndarray) -> np.ndarray:
    return array


HOST = Placement("numpy", _itself, _itself)


def placement(backend: str, device: str | None = None) -> Placement:
    """The placement of a backend's name and one of its devices, its own choice if None.

    Raises:
        ConfigError: there is no such backend, or it cannot use the device.
    """
    if backend == "numpy" and device in (None, "cpu"):
        return HOST
    from peftarray.backend import load_backend

    library = load_backend(backend)

    def put(array: np.ndarray) -> Array:
        there = library.from_host(array, device=device)
        if getattr(there.dtype, "itemsize", array.itemsize) != array.itemsize:
            message = (
                f"{backend} holds {array.dtype} as {there.dtype}, so float64 weights would lose digits; merge with "
                "--backend numpy, or let the library keep float64 (JAX: JAX_ENABLE_X64=1)"
            )
            raise UnsupportedError(message)
        return there

    try:
        put(np.zeros(1, np.float32))
    except PeftError:
        raise
    except Exception as error:  # each library has errors of its own for a device that it lacks
        why = str(error).partition("\n")[0][:200]
        message = f"device is {device!r}, which {backend} cannot use here ({why}); give another, or leave it out"
        raise ConfigError(message) from None
    return Placement(f"{backend} on {device}" if device else backend, put, library.to_host)
