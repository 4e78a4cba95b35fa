"""What a `config.json` says of a model, as a frozen dataclass that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from peftarray.settings import Rule, optional, whole

__all__ = ["read_config", "token"]

C = TypeVar("C")

token = Rule(
    lambda value: (
        optional(whole(0)).allows(value)
        or (isinstance(value, tuple) and len(value) > 0 and all(whole(0).allows(item) for item in value))
    ),
    "None, a token number or a list of them",
)
"""The rule of a field that names one token or several."""


def read_config(kind: type[C], data: Mapping[str, Any]) -> C:
    """The fields of the dataclass `kind` that `data` names, checked; whatever else it names is of no concern here.

    Raises:
        ConfigError: a value that its rule does not allow.
        UnsupportedError: a field asks for what is not supported.
    """
    known = {item.name for item in fields(kind)} & data.keys()  # type: ignore[arg-type]
    return kind(**{name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in known})
