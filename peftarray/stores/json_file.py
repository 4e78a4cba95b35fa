"""JSON files read with suspicion: a size limit before anything is read, no duplicate keys, and an object at the top."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from peftarray.errors import FormatError

__all__ = ["parse_json", "read_json"]

_LIMIT = 64 << 20


def read_json(path: Path, limit: int = _LIMIT) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FormatError: the file is missing, over `limit` bytes, not UTF-8 JSON, repeats a key, holds half a character, or
            is not an object.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            message = (
                f"{path} is {size} bytes; a JSON file of this kind may have {limit}; check that it is the right file"
            )
            raise FormatError(message)
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        raise FormatError(message) from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names its origin in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            message = f"{where} has the name {twice!r} twice; each name may stand once; the file is damaged or forged"
            raise FormatError(message)
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in data:
            # An escape may name half a surrogate pair, which no file can be written with.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        message = f"{where} is not valid JSON ({type(error).__name__}: {str(error)[:80]}); download or save it again"
        raise FormatError(message) from None
    if not isinstance(value, dict):
        message = f"{where} holds a JSON {type(value).__name__}; it must hold an object"
        raise FormatError(message)
    return value
