"""Which cases run on which library: all on NumPy, which is quick, and some on each of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

_OTHERS = ("array_api_strict", "torch", "jax", "cupy")


def on_libraries(names: str, cases: Iterable[tuple[Any, ...]], *, also: Callable[..., bool]) -> Any:
    """A parametrisation of a test that takes the library's fixtures.

    Args:
        names: of the arguments, separated by commas.
        cases: their values.
        also: says of a case whether it runs on the other libraries as well.
    """
    every = list(cases)
    chosen = [("numpy", *case) for case in every]
    chosen += [(library, *case) for library in _OTHERS for case in every if also(*case)]
    ids = ["-".join(str(part) for part in case if isinstance(part, (str, int))) for case in chosen]
    return pytest.mark.parametrize(f"library,{names}", chosen, ids=ids, indirect=["library"])
