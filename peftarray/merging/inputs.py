"""What a merge is given: a base, adapters with their factors, and sizes in words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.dtypes import decode, storage_dtype
from peftarray.errors import ConfigError, FormatError, NumberError, UnsupportedError
from peftarray.formats import peft
from peftarray.formats.adapters import Adapters
from peftarray.merging.base import Base, open_base
from peftarray.merging.journal import JOURNAL

__all__ = ["PathLike", "check_numbers", "open_inputs", "parse_size"]

PathLike = str | os.PathLike[str]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def open_inputs(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    scale: float | Sequence[float],
    *,
    allow_unmatched: bool,
    base_as: str | None = None,
    quantised: bool = False,
) -> tuple[Base, list[tuple[Adapters, float]]]:
    """The base, and each adapter read against it with its factor; `quantised` says whether it is to stay so."""
    paths = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    if not paths:
        message = "no adapter was given; give at least one folder"
        raise ConfigError(message)
    given: Any = scale  # whatever a caller passed
    try:
        scales = [float(value) for value in ([given] * len(paths) if isinstance(given, Real) else list(given))]
    except (TypeError, ValueError, OverflowError):
        scales = []
    if isinstance(given, str) or len(scales) != len(paths) or not np.isfinite(scales).all():
        message = f"scale is {scale!r} for {len(paths)} adapters; give one finite number, or one for each"
        raise ConfigError(message)
    try:
        path = Path(base)
        if path.is_dir() and (path / JOURNAL).is_file():
            message = f"{base} is the result of a merge that did not finish; run that merge again to finish it"
            raise FormatError(message)
        source = open_base(path, base_as)
        if source.original is not None and not quantised:
            source = source.only_original()
        found = [peft.read(Path(path), source.tensors, allow_unmatched=allow_unmatched) for path in paths]
    except OSError as error:
        message = f"{error.filename} cannot be read ({error.strerror}); check the path and its permissions"
        raise FormatError(message) from None
    return source, list(zip(found, scales, strict=True))


def parse_size(size: int | str) -> int:
    """A number of bytes from `"500MB"`, `"5GB"` or a plain number.

    Example:
        >>> parse_size("5GB")
        5000000000
    """
    text = str(size).strip().upper()
    digits = text.rstrip("KMGTB")
    try:
        value = float(digits) * _UNITS[text[len(digits) :]]
        if value < 1 or value != value:
            raise ValueError
        return int(value)
    except (KeyError, ValueError, OverflowError):
        message = f"max_shard_size is {size!r}; give a number of bytes of at least 1, or one with KB, MB, GB or TB"
        raise ConfigError(message) from None


def check_numbers(adapter: Adapters) -> None:
    """Refuse NaN and infinity in any tensor that goes into the result, before anything is written."""
    unused = {*adapter.unused, *adapter.unmatched}
    factors = {ref.name for site in adapter.sites for ref in site.params.values()}
    for name, info in adapter.tensors.items():
        dtype = storage_dtype(info.code)
        floating = dtype is not None and dtype.floating
        if name in factors and not floating:
            message = f"{adapter.name}: {name} is stored as {info.code}; a method's tensors must be floating numbers"
            raise UnsupportedError(message)
        if name in unused or dtype is None or not floating or not info.nbytes:
            continue
        rows = info.shape[0] if info.shape else 1
        step = max(1, (4 << 20) * rows // info.nbytes)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows)) if info.shape else None
            values = decode(adapter.tensors.read_stored(name, part), dtype).reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                # A finite sum of squares needs finite terms; only an overflow is looked at closely.
                sound = np.isfinite(np.dot(values, values)) or np.isfinite(values).all()
            if not sound:
                bad = int((~np.isfinite(values)).sum())
                message = (
                    f"{adapter.name}: {name} holds {bad} NaN or infinite values (of {values.size} looked at); "
                    "such an adapter diverged in training: use an earlier checkpoint"
                )
                raise NumberError(message)
