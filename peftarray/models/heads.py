"""Rows of activations as heads of attention, and back."""

from __future__ import annotations

from peftarray.arrays import Array, namespace

__all__ = ["join_heads", "split_heads"]


def split_heads(rows: Array, batch: int, heads: int) -> Array:
    """Rows `(batch * length, heads * width)` as `(batch, heads, length, width)`."""
    xp = namespace(rows)
    parts = xp.reshape(rows, (batch, rows.shape[0] // batch, heads, rows.shape[1] // heads))
    return xp.permute_dims(parts, (0, 2, 1, 3))


def join_heads(parts: Array) -> Array:
    """The inverse: `(batch, heads, length, width)` as rows `(batch * length, heads * width)`."""
    xp = namespace(parts)
    batch, heads, length, width = parts.shape
    return xp.reshape(xp.permute_dims(parts, (0, 2, 1, 3)), (batch * length, heads * width))
