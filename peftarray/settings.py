"""Fields of a configuration with their rules: each says what it allows, and is checked once, when it is built.

A rule is a value test and the words that an error uses for it. Configurations come from strangers' JSON files, so the
test includes the type.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from peftarray.errors import ConfigError, UnsupportedError

__all__ = [
    "Rule",
    "boolean",
    "check_settings",
    "indices",
    "mapping_of",
    "name_list",
    "names",
    "number",
    "one_of",
    "optional",
    "refused",
    "setting",
    "text",
    "whole",
]


@dataclass(frozen=True)
class Rule:
    """What values a field takes: the test, and the words for it."""

    allows: Callable[[Any], bool]
    words: str


def whole(minimum: int) -> Rule:
    """Whole numbers from `minimum` on."""
    return Rule(lambda value: type(value) is int and value >= minimum, f"a whole number of at least {minimum}")


def number(minimum: float = -math.inf, maximum: float = math.inf) -> Rule:
    """Finite numbers from `minimum` to `maximum`."""
    words = "a finite number" + ("" if minimum == -math.inf else f" of at least {minimum:g}")
    if maximum < math.inf:
        words = f"a number from {minimum:g} to {maximum:g}"
    # Whole numbers of JSON have no bound; those beyond a float would overflow in the first formula.
    least, most = max(minimum, -sys.float_info.max), min(maximum, sys.float_info.max)
    return Rule(lambda value: type(value) in (int, float) and least <= value <= most, words)


def one_of(*values: object) -> Rule:
    """One of the given values, of the same type."""
    return Rule(
        lambda value: any(value == other and type(value) is type(other) for other in values),
        "one of " + ", ".join(repr(value) for value in values),
    )


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows."""
    return Rule(lambda value: value is None or rule.allows(value), f"None or {rule.words}")


def mapping_of(rule: Rule) -> Rule:
    """A mapping from strings to what `rule` allows."""
    return Rule(
        lambda value: isinstance(value, Mapping) and all(type(k) is str and rule.allows(v) for k, v in value.items()),
        f"a mapping from names to values, each {rule.words}",
    )


boolean = Rule(lambda value: type(value) is bool, "True or False")
text = optional(Rule(lambda value: type(value) is str, "a string"))
indices = Rule(
    lambda value: (
        value is None
        or (type(value) is int and value >= 0)
        or (isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value))
    ),
    "None, a layer number or a list of them",
)
name_list = Rule(
    lambda value: value is None or (isinstance(value, (list, tuple)) and all(type(item) is str for item in value)),
    "None or a list of names",
)
names = Rule(
    lambda value: (
        value is None
        or type(value) is str
        or (isinstance(value, (list, tuple, set, frozenset)) and all(type(item) is str for item in value))
    ),
    "None, a pattern (string) or a list of names",
)


def setting(default: Any, rule: Rule, *, doc: str = "") -> Any:
    """A dataclass field with a default and a rule. A mapping as default is copied for each instance."""
    metadata = {"rule": rule, "doc": doc}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def refused(default: Any, reason: str) -> Any:
    """A field of PEFT's that changes the result and is not supported: any value that turns it on is an error."""
    return field(default=default, metadata={"refused": reason})


def check_settings(config: Any) -> None:
    """Check every field of a dataclass instance against its rule.

    Raises:
        ConfigError: a value that its rule does not allow.
        UnsupportedError: a field that is refused is turned on.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        rule = item.metadata.get("rule")
        if rule is not None and not rule.allows(value):
            message = f"{type(config).__name__}.{item.name} is {_short(value)}; it must be {rule.words}"
            raise ConfigError(message)
        if "refused" in item.metadata and value and value != _default(item):
            message = (
                f"{type(config).__name__}.{item.name} is {_short(value)}, which is not supported: "
                f"{item.metadata['refused']}"
            )
            raise UnsupportedError(message)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default is not MISSING else None


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 80 else words[:77] + "..."
