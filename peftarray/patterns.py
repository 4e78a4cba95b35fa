"""Regular expressions that strangers wrote: an adapter's patterns are matched within budgets of time and memory.

A pattern such as `(a+)+$` takes exponential time on the wrong name. The `regex` package can stop a search that runs too
long; such a pattern is an error, not a hang. A pattern such as `((a{1000}){1000}){1000}` is written out when it is
compiled, and takes all memory; it is refused by what its counts make.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from peftarray.errors import ConfigError

if TYPE_CHECKING:
    import regex

__all__ = ["fullmatch", "match"]

_SECONDS = 0.5
"""For one name."""
_SLOW, _SECONDS_IN_ALL = 0.01, 5.0
"""Searches that take longer than the first may take the second together."""
_LONGEST = 10_000
_LARGEST = 1_000_000
"""Length times the product of all counts."""


@dataclass
class _Pattern:
    """A compiled pattern, and how long its slow searches took."""

    compiled: regex.Pattern[str]
    seconds: float = 0.0


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str, field: str) -> _Pattern:
    if len(pattern) > _LONGEST:
        message = f"{field} is a pattern of {len(pattern)} characters; at most {_LONGEST} are allowed"
        raise ConfigError(message)
    if len(pattern) * math.prod(map(_largest_count, re.findall(r"\{([^{}]*)\}", pattern))) > _LARGEST:
        message = (
            f"{field} is {pattern[:200]!r}, whose counts of repetition make it too large; use smaller ones, or a list "
            "of names"
        )
        raise ConfigError(message)
    # Imported by the first pattern: most adapters have lists of names and need none.
    import regex

    try:
        return _Pattern(regex.compile(pattern, flags=regex.VERSION0))
    except (regex.error, RecursionError, OverflowError) as error:
        message = f"{field} is {pattern[:200]!r}, which is not a regular expression ({error}); correct it"
        raise ConfigError(message) from None


def _largest_count(braced: str) -> int:
    """The largest number between two braces, 1 at least; what may not be a count is taken for one."""
    return max((int(digits[:9]) for digits in re.findall(r"[0-9]+", braced)), default=1) or 1


def fullmatch(pattern: str, text: str, field: str) -> bool:
    """Whether all of `text` matches; `field` names the pattern's origin in messages.

    Raises:
        ConfigError: the pattern is no regular expression, or takes longer than half a second on one name.

    Example:
        >>> fullmatch(r".*\\.q_proj", "layers.0.q_proj", "target_modules")
        True
    """
    found = _compiled(pattern, field)
    return _timed(found, found.compiled.fullmatch, pattern, text, field) is not None


def match(pattern: str, text: str, field: str) -> regex.Match[str] | None:
    """The match of `pattern` at the start of `text`, or None; errors as in `fullmatch`."""
    found = _compiled(pattern, field)
    return _timed(found, found.compiled.match, pattern, text, field)


def _timed(
    found: _Pattern, search: Callable[..., regex.Match[str] | None], pattern: str, text: str, field: str
) -> regex.Match[str] | None:
    started = time.perf_counter()
    try:
        result = search(text, timeout=_SECONDS)
    except TimeoutError:
        raise _too_slow(pattern, text, field) from None
    seconds = time.perf_counter() - started
    if seconds > _SLOW:
        found.seconds += seconds
        if found.seconds > _SECONDS_IN_ALL:
            raise _too_slow(pattern, text, field)
    return result


def _too_slow(pattern: str, text: str, field: str) -> ConfigError:
    return ConfigError(
        f"{field} is {pattern[:200]!r}, which takes more than {_SECONDS} s on the name {text[:200]!r}, or "
        f"{_SECONDS_IN_ALL:g} s in all; use a pattern without nested repetition, or a list of names"
    )
