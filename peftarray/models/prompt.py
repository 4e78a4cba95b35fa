"""Soft prompts among the weights of a model: virtual tokens that stand before those of every text."""

from __future__ import annotations

from typing import Any

import numpy as np

from peftarray.arrays import Array, constant, namespace
from peftarray.errors import ShapeError
from peftarray.models.cache import Pair
from peftarray.models.linear import Weights
from peftarray.prompts.prompt import KEY_VALUES, TOKENS

__all__ = ["behind", "masked_behind", "placed_behind", "prefix", "virtual_rows", "virtual_tokens"]


def virtual_tokens(weights: Weights) -> int:
    """How many virtual tokens stand before a text.

    Raises:
        ShapeError: the weights hold two prompts.
    """
    found = [weights[name].shape[-2] for name in (TOKENS, KEY_VALUES) if name in weights]
    if len(found) > 1:
        message = f"the weights hold {TOKENS} and {KEY_VALUES}; a model takes one prompt"
        raise ShapeError(message)
    return int(found[0]) if found else 0


def virtual_rows(weights: Weights, batch: int, width: int) -> Array | None:
    """The rows of virtual tokens, `(batch, n, width)`; None where the prompt is none of rows.

    Raises:
        ShapeError: they are for another model, or for another number of texts.
    """
    if TOKENS not in weights:
        return None
    rows = weights[TOKENS]
    if rows.ndim not in (2, 3) or rows.shape[-1] != width or (rows.ndim == 3 and rows.shape[0] != batch):
        message = f"{TOKENS} is {tuple(rows.shape)}; this model wants (n, {width}), or ({batch}, n, {width}) by text"
        raise ShapeError(message)
    return namespace(rows).broadcast_to(rows, (batch, *rows.shape[-2:]))


def prefix(weights: Weights, batch: int, layers: int, groups: int, width: int) -> tuple[Pair, ...]:
    """The keys and values that a prompt brings to each layer, `(batch, groups, n, width)`; none where it brings none.

    Raises:
        ShapeError: they are for another model.
    """
    if KEY_VALUES not in weights:
        return ()
    stacked = weights[KEY_VALUES]
    if stacked.ndim != 4 or (*stacked.shape[:2], stacked.shape[3]) != (2 * layers, groups, width):
        message = f"{KEY_VALUES} is {tuple(stacked.shape)}; this model wants ({2 * layers}, {groups}, n, {width})"
        raise ShapeError(message)
    xp, shape = namespace(stacked), (batch, *stacked.shape[1:])
    every = [xp.broadcast_to(stacked[i, ...], shape) for i in range(2 * layers)]
    return tuple(zip(every[::2], every[1::2], strict=True))


def behind(first: Array | None, rows: Array, batch: int) -> Array:
    """The rows of texts `(batch * length, width)`, those of each behind its virtual tokens."""
    if first is None:
        return rows
    xp, width = namespace(first, rows), rows.shape[1]
    return xp.reshape(xp.concat([first, xp.reshape(rows, (batch, -1, width))], axis=1), (-1, width))


def masked_behind(count: int, attention_mask: Any, like: Array) -> Any:
    """An attention mask of texts `(batch, length)` with so many virtual tokens before them."""
    if isinstance(attention_mask, (list, tuple)) and all(len(row) == len(attention_mask[0]) for row in attention_mask):
        attention_mask = np.asarray(attention_mask)
    if not count or len(getattr(attention_mask, "shape", ())) != 2:  # what is no mask is refused where it is read
        return attention_mask
    ones = np.ones((attention_mask.shape[0], count), np.int64)
    if isinstance(attention_mask, np.ndarray):
        return np.concatenate([ones.astype(attention_mask.dtype), attention_mask], axis=1)
    xp = namespace(attention_mask, like)
    return xp.concat([xp.astype(constant(ones, like), attention_mask.dtype), attention_mask], axis=1)


def placed_behind(count: int, positions: Any, *, first: bool) -> Any:
    """The positions of texts behind so many virtual tokens, with those of these where they come along."""
    if not count or positions is None:
        return positions
    places = np.asarray(positions) + count
    own = np.broadcast_to(np.arange(count), (*places.shape[:-1], count))
    return np.concatenate([own, places], axis=-1) if first else places
