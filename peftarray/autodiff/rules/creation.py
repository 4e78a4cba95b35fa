"""Functions that make arrays: constants, whatever they are shaped after, except those that copy traced values."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array
from peftarray.autodiff.rules.family import Family

__all__ = ["CREATION"]

CREATION = Family(
    constants=set(
        "zeros_like ones_like empty_like can_cast finfo iinfo isdtype result_type broadcast_shapes shape ndim size "
        "iscomplexobj isrealobj".split()
    )
)


@CREATION.composition("asarray")
def _asarray(xp: Any, x: Array, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Array:
    if device is not None and device != x.device:
        x = x.to_device(device)
    return x if dtype in (None, x.dtype) else xp.astype(x, dtype)


@CREATION.composition("full")
def _full(xp: Any, shape: Any, fill_value: Array, *, dtype: Any = None, device: Any = None) -> Array:
    return xp.broadcast_to(xp.asarray(fill_value, dtype=dtype, device=device), shape)


@CREATION.composition("full_like")
def _full_like(xp: Any, x: Array, fill_value: Array, *, dtype: Any = None, device: Any = None) -> Array:
    return xp.ones_like(x, dtype=dtype, device=device) * fill_value
