"""Soft prompts among the weights of a model: virtual tokens that stand before those of every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from peftarray.arrays import Array, constant, namespace
from peftarray.errors import ShapeError
from peftarray.models.cache import Pair
from peftarray.models.linear import Weights
from peftarray.prompts.prompt import COUNTS, KEY_VALUES, TOKENS

__all__ = ["Virtual", "behind", "prefix", "virtual_rows", "virtual_tokens"]


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens that stand before texts.

    Attributes:
        rows: how many are rows of the input.
        pairs: how many are keys and values; they stand before the rows.
        own: for each text how many of both are its own, the last ones, `(batch, 2)`; None where all are.
    """

    rows: int = 0
    pairs: int = 0
    own: np.ndarray | None = None

    @property
    def total(self) -> int:
        """How many there are."""
        return self.rows + self.pairs

    def masked(self, attention_mask: Any, like: Array, batch: int, length: int) -> Any:
        """An attention mask of texts `(batch, length)` with the virtual tokens before them; None where all is seen."""
        if isinstance(attention_mask, (list, tuple)) and all(
            len(row) == len(attention_mask[0]) for row in attention_mask
        ):
            attention_mask = np.asarray(attention_mask)
        if attention_mask is None and self.own is not None:
            attention_mask = np.ones((batch, length), np.int64)
        if (
            not self.total or len(getattr(attention_mask, "shape", ())) != 2
        ):  # what is no mask is refused where it is read
            return attention_mask
        seen = self._seen(attention_mask.shape[0])
        if isinstance(attention_mask, np.ndarray):
            return np.concatenate([seen.astype(attention_mask.dtype), attention_mask], axis=1)
        xp = namespace(attention_mask, like)
        return xp.concat([xp.astype(constant(seen, like), attention_mask.dtype), attention_mask], axis=1)

    def placed(self, positions: Any, batch: int, past: int, length: int, *, first: bool) -> Any:
        """The positions of texts behind their virtual tokens, with those of the rows where these come along.

        Args:
            positions: of the texts, or None.
            batch, past, length: how many texts, tokens of each that came before, tokens.
            first: whether the rows of virtual tokens come along.
        """
        if not self.total or (positions is None and self.own is None):
            return positions
        places = np.arange(past, past + length) if positions is None else np.asarray(positions)
        if self.own is None:
            places = places + self.total
            own = np.broadcast_to(np.arange(self.pairs, self.total), (*places.shape[:-1], self.rows))
        else:
            rows, pairs = self.own[:, :1], self.own[:, 1:]
            places = np.broadcast_to(places, (batch, length)) + rows + pairs
            own = pairs + np.maximum(np.arange(self.rows) - (self.rows - rows), 0)
        return np.concatenate([own, places], axis=-1) if first else places

    def _seen(self, batch: int) -> np.ndarray:
        if self.own is None:
            return np.ones((batch, self.total), np.int64)
        parts = [(self.pairs, self.own[:, 1:]), (self.rows, self.own[:, :1])]
        return np.concatenate([np.arange(n) >= n - own for n, own in parts], axis=1).astype(np.int64)


def virtual_tokens(weights: Weights) -> Virtual:
    """The virtual tokens that stand before texts.

    Raises:
        ShapeError: the weights hold two prompts, and do not say whose they are.
    """
    rows, pairs = (int(weights[name].shape[-2]) if name in weights else 0 for name in (TOKENS, KEY_VALUES))
    own = np.asarray(weights[COUNTS]) if COUNTS in weights else None
    if rows and pairs and own is None:
        message = f"the weights hold {TOKENS} and {KEY_VALUES}; a model takes one prompt"
        raise ShapeError(message)
    return Virtual(rows, pairs, own)


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
    own = stacked.ndim == 5 and stacked.shape[1] == batch
    sizes = (stacked.shape[0], stacked.shape[-3], stacked.shape[-1])
    if not (own or stacked.ndim == 4) or sizes != (2 * layers, groups, width):
        message = f"{KEY_VALUES} is {tuple(stacked.shape)}; this model wants ({2 * layers}, {groups}, n, {width})"
        raise ShapeError(message)
    xp, shape = namespace(stacked), (batch, *stacked.shape[-3:])
    every = [xp.broadcast_to(stacked[i, ...], shape) for i in range(2 * layers)]
    return tuple(zip(every[::2], every[1::2], strict=True))


def behind(first: Array | None, rows: Array, batch: int) -> Array:
    """The rows of texts `(batch * length, width)`, those of each behind its virtual tokens."""
    if first is None:
        return rows
    xp, width = namespace(first, rows), rows.shape[1]
    return xp.reshape(xp.concat([first, xp.reshape(rows, (batch, -1, width))], axis=1), (-1, width))
