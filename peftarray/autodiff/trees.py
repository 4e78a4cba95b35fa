"""Trees: arrays in nested dicts, lists and tuples, and the names of their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["leaves", "named", "refill"]


def named(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every leaf, in order: the keys on the way to it, joined by dots.

    Example:
        >>> list(named({"layers": [{"up": 1, "down": 2}], "head": 3}))
        [('layers.0.up', 1), ('layers.0.down', 2), ('head', 3)]
    """
    items = _items(tree)
    if items is None:
        yield name, tree
        return
    for key, branch in items:
        yield from named(branch, f"{name}.{key}" if name else str(key))


def leaves(tree: Any) -> list[Any]:
    """Every leaf, in order."""
    return [leaf for _, leaf in named(tree)]


def refill(tree: Any, new: Iterable[Any]) -> Any:
    """A tree of the same form with other leaves, in order.

    Example:
        >>> refill({"a": (1, 2), "b": 3}, "xyz")
        {'a': ('x', 'y'), 'b': 'z'}
    """
    return _refill(tree, iter(new))


def _refill(tree: Any, new: Iterator[Any]) -> Any:
    items = _items(tree)
    if items is None:
        return next(new)
    filled = [(key, _refill(branch, new)) for key, branch in items]
    if isinstance(tree, Mapping):
        return dict(filled)
    values = (value for _, value in filled)
    # A named tuple takes its values one by one.
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _items(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if isinstance(tree, (list, tuple)) else None
