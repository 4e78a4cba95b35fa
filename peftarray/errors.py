"""What can go wrong, as exceptions: one base class, and one kind for each thing a caller may want to tell apart.

Every message says what was given, what is allowed and what to do, on one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "FormatError",
    "MatchError",
    "NumberError",
    "OutputError",
    "PeftError",
    "QualityError",
    "ShapeError",
    "UnsupportedError",
    "nearest",
]

_LONGEST = 4000


class PeftError(Exception):
    """Base of every error that peftarray raises for bad input. `str(error)` is one line that says what to do."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        text = " ".join(message.split())
        # Names come from strangers' files: no control character of theirs reaches a terminal, and no line is endless.
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")


class ConfigError(PeftError):
    """A configuration field has a value that is not allowed, is unknown, or contradicts another."""


class FormatError(PeftError):
    """A file is damaged, truncated, or not what its name says."""


class MatchError(PeftError):
    """An adapter and a base do not belong together: names, layers or tensors without a counterpart."""


class ShapeError(MatchError):
    """A tensor's shape does not fit the layer that it is for."""


class NumberError(PeftError):
    """A tensor holds NaN or infinity where only numbers are allowed."""


class UnsupportedError(PeftError):
    """The request is understood but cannot be carried out faithfully, so it is refused."""


class OutputError(PeftError):
    """The result cannot be written: the place exists, is full, or may not be written to."""


class QualityError(PeftError):
    """The work was done, and its result fails a gate that the caller set (exit status 3)."""

    exit_status = 3


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The end of a message: `; nearest: a, b` for the names most like `name`, or nothing where none is."""
    pool = list(names)
    tail = name.rsplit(".", 1)[-1]
    # difflib is quadratic in the length of the pool: names that share the last component come first.
    likely = [other for other in pool if tail in other] or pool
    found = difflib.get_close_matches(name, likely[:2000], n=count, cutoff=0.5)
    if not found:
        # The end of a long name may be meant.
        ends = {other.rsplit(".", 1)[-1]: other for other in reversed(pool)}
        found = [ends[end] for end in difflib.get_close_matches(tail, list(ends)[:2000], n=count, cutoff=0.6)]
    return f"; nearest: {', '.join(found)}" if found else ""
