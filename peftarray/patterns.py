"""Regular expressions that strangers wrote: an adapter's patterns are matched within a budget of time.

A pattern such as `(a+)+$` takes exponential time on the wrong name. The `regex` package can stop a search that runs too
long; such a pattern is an error, not a hang.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from peftarray.errors import ConfigError

if TYPE_CHECKING:
    import regex

__all__ = ["fullmatch", "match"]

_SECONDS = 0.5
_LONGEST = 10_000


@lru_cache(maxsize=1024)
def _compiled(pattern: str, field: str) -> regex.Pattern[str]:
    if len(pattern) > _LONGEST:
        message = f"{field} is a pattern of {len(pattern)} characters; at most {_LONGEST} are allowed"
        raise ConfigError(message)
    # Imported by the first pattern: most adapters have lists of names and need none.
    import regex

    try:
        return regex.compile(pattern, flags=regex.VERSION0)
    except (regex.error, RecursionError, OverflowError) as error:
        message = f"{field} is {pattern!r}, which is not a regular expression ({error}); correct it"
        raise ConfigError(message) from None


def fullmatch(pattern: str, text: str, field: str) -> bool:
    """Whether all of `text` matches; `field` names the pattern's origin in messages.

    Raises:
        ConfigError: the pattern is no regular expression, or takes longer than half a second on one name.

    Example:
        >>> fullmatch(r".*\\.q_proj", "layers.0.q_proj", "target_modules")
        True
    """
    try:
        return _compiled(pattern, field).fullmatch(text, timeout=_SECONDS) is not None
    except TimeoutError:
        raise _too_slow(pattern, text, field) from None


def match(pattern: str, text: str, field: str) -> regex.Match[str] | None:
    """The match of `pattern` at the start of `text`, or None; errors as in `fullmatch`."""
    try:
        return _compiled(pattern, field).match(text, timeout=_SECONDS)
    except TimeoutError:
        raise _too_slow(pattern, text, field) from None


def _too_slow(pattern: str, text: str, field: str) -> ConfigError:
    return ConfigError(
        f"{field} is {pattern[:200]!r}, which takes more than {_SECONDS} s on the name {text[:200]!r}; "
        "use a pattern without nested repetition, or a list of names"
    )
