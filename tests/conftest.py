"""The array libraries that a test runs on, and how hypothesis draws.

A test that takes `xp` runs once for each library. It makes its arrays with `asarray` (or passes `device=device`), so
that they lie where a copy to the host would be noticed, and compares after `to_numpy`. Code under test never sees these
fixtures: it asks the arrays.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# Benchmarks are programs, not tests; the doctest collector would import them.
collect_ignore = ["benchmarks"]

# The same examples on every machine and in every run: a failure is one that anybody can repeat. Another profile can be
# chosen with --hypothesis-profile.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


def _numpy() -> tuple[Any, Any]:
    return importlib.import_module("array_api_compat.numpy"), "cpu"


def _array_api_strict() -> tuple[Any, Any]:
    """On the second device of the strict library, whose arrays refuse every silent way to NumPy."""
    xp = importlib.import_module("array_api_strict")
    return xp, xp.Device("device1")


def _torch() -> tuple[Any, Any]:
    """On the GPU where there is one: its tensors, too, refuse to turn into NumPy arrays."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # the workers of one run share the cores
    xp = importlib.import_module("array_api_compat.torch")
    return xp, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _jax() -> tuple[Any, Any]:
    """With 64-bit types, which the standard has and JAX leaves out unless asked; compiled fast, not to run fast."""
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.numpy, jax.devices()[0]


def _cupy() -> tuple[Any, Any]:
    cupy = importlib.import_module("cupy")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if not count:
        pytest.skip("CuPy finds no GPU")
    return importlib.import_module("array_api_compat.cupy"), cupy.cuda.Device(0)


LIBRARIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "numpy": _numpy,
    "array_api_strict": _array_api_strict,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
}


@pytest.fixture(scope="session", params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The namespace and the device of the library that the test runs on; skips where it is not installed."""
    pytest.importorskip(request.param, exc_type=ModuleNotFoundError)
    return LIBRARIES[request.param]()


@pytest.fixture(scope="session")
def xp(library: tuple[Any, Any]) -> Any:
    """An array API namespace; the test runs once for each library."""
    return library[0]


@pytest.fixture(scope="session")
def device(library: tuple[Any, Any]) -> Any:
    """Where the arrays of this test lie: not on the host, for libraries that can tell the difference."""
    return library[1]


@pytest.fixture(scope="session")
def asarray(xp: Any, device: Any) -> Callable[..., Any]:
    """`asarray(values, dtype=None)`: an array of `xp` on `device`, from host values."""

    def to_device(values: Any, dtype: Any = None) -> Any:
        return xp.asarray(np.asarray(values), dtype=dtype, device=device, copy=True)

    return to_device


@pytest.fixture(scope="session")
def to_numpy() -> Callable[[Any], np.ndarray]:
    """`to_numpy(array)`: a NumPy array with the values of any library's array.

    Written apart from the package's own conversion, which it helps to test.
    """

    def to_host(array: Any) -> np.ndarray:
        home = type(array).__module__.partition(".")[0]
        if home == "torch":
            array = array.detach().cpu()
        elif home == "cupy":
            array = array.get()
        elif home == "array_api_strict":
            array = array.to_device(importlib.import_module(home).Device("CPU_DEVICE"))
        return np.asarray(array)

    return to_host
