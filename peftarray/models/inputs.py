"""What a caller gives, checked and brought to where the weights lie: token numbers, padding masks, positions.

Lists and NumPy arrays are looked at before they move. Arrays of another library are taken as they are: to look into
them would wait for the device, and a compiler could not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftarray.arrays import Array, constant, integers, namespace
from peftarray.errors import ConfigError, PeftError, ShapeError

__all__ = ["Tokens", "score_mask", "token_numbers", "token_positions"]

Tokens = Array | Sequence[Sequence[int]]
"""Whole numbers `(batch, length)`, as any array or as lists."""


def token_numbers(values: Tokens, like: Array, vocabulary: int, what: str = "input_ids") -> Array:
    """Numbers of rows of a table, `(batch, length)`, beside the array `like`.

    Raises:
        PeftError: not whole numbers of that shape, or outside of `[0, vocabulary)`.
    """
    host = _on_host(values, what)
    if host is None:
        _check_shape(values, what)
        return values
    _check_shape(host, what)
    if host.dtype.kind not in "iu":
        message = f"{what} are {host.dtype}; they must be whole numbers, one for each token"
        raise PeftError(message)
    least, most = int(host.min()), int(host.max())
    if least < 0 or most >= vocabulary:
        message = (
            f"{what} hold {least if least < 0 else most}; the model has rows 0 to {vocabulary - 1}: use the tokenizer "
            "that belongs to it"
        )
        raise PeftError(message)
    return integers(host, like)


def token_positions(given: Any, batch: int, past: int, length: int, limit: int) -> np.ndarray:
    """The place of each token in its text, `(length,)` or `(batch, length)`; counted on from `past` if none is given.

    Raises:
        PeftError: a place beyond what the model has, or another shape.
    """
    if past + length > limit:
        message = f"the sequence has {past + length} tokens; this model takes {limit}: cut the text or split it"
        raise PeftError(message)
    if given is None:
        return np.arange(past, past + length)
    positions = _on_host(given, "positions")
    if positions is None or positions.dtype.kind not in "iu" or positions.shape not in ((length,), (batch, length)):
        found = type(given).__name__ if positions is None else f"{positions.dtype} {positions.shape}"
        message = f"positions are {found}; give whole numbers ({batch}, {length}), as lists or as a NumPy array"
        raise ShapeError(message)
    if positions.min() < 0 or positions.max() >= limit:
        message = f"positions reach from {positions.min()} to {positions.max()}; this model has 0 to {limit - 1}"
        raise PeftError(message)
    return positions


def score_mask(
    attention_mask: Any, batch: int, past: int, length: int, like: Array, *, window: int | None = None
) -> Array | None:
    """What is added to attention scores: a large negative number where a token must not be seen, None where all may.

    Args:
        attention_mask: `(batch, past + length)`, 1 for tokens and 0 for padding; None for no padding.
        batch, past, length: how many samples, tokens that came before, tokens that look.
        like: an array of the library, device and dtype of the scores.
        window: a token sees so many tokens at most, itself the last. That it sees none after it is not said here.

    Returns:
        `(length, past + length)` or `(batch, 1, 1 or length, past + length)`.
    """
    # Two of them may meet in one place without becoming infinite, and a row of padding has no NaN.
    low = -float(namespace(like).finfo(like.dtype).max) / 4
    gone = None if window is None else _gone(past, length, window)
    mask = None if attention_mask is None else _on_host(attention_mask, "attention_mask")
    if attention_mask is not None:
        _check_mask(attention_mask if mask is None else mask, batch, past + length)
    if attention_mask is None or (mask is not None and mask.all()):
        return None if gone is None else constant(np.where(gone, low, 0.0), like)
    if mask is not None:
        padding = (mask == 0)[:, None, None, :]
        return constant(np.where(padding if gone is None else padding | gone, low, 0.0), like)
    xp = namespace(attention_mask, like)
    kept = xp.astype(xp.reshape(attention_mask, (batch, 1, 1, past + length)), like.dtype)
    added = (1.0 - kept) * low
    return added if gone is None else added + constant(np.where(gone, low, 0.0), like)


def _gone(past: int, length: int, window: int) -> np.ndarray | None:
    """Whether a column has left the window of a row, `(length, past + length)`; None where none has."""
    distance = past + np.arange(length)[:, None] - np.arange(past + length)
    return distance >= window if past + length > window else None


def _on_host(values: Any, what: str) -> np.ndarray | None:
    """Lists and NumPy arrays as a NumPy array, None for arrays of other libraries."""
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, (list, tuple)):
        return None
    try:
        return np.asarray(values)
    except ValueError:
        message = f"the lists of {what} differ in length; pad them to one length, with an attention_mask of zeros there"
        raise ShapeError(message) from None
    except TypeError:
        message = f"{what} are lists of what are no plain numbers; give arrays to a function that is compiled"
        raise PeftError(message) from None


def _check_shape(values: Any, what: str) -> None:
    if len(values.shape) != 2 or 0 in values.shape:
        message = f"{what} have the shape {tuple(values.shape)}; they must be (batch, length), neither of them 0"
        raise ShapeError(message)


def _check_mask(mask: Any, batch: int, seen: int) -> None:
    if tuple(mask.shape) != (batch, seen):
        message = f"attention_mask is {tuple(mask.shape)}; it must be ({batch}, {seen}), 1 for tokens and 0 for padding"
        raise ShapeError(message)
    if isinstance(mask, np.ndarray) and not ((mask == 0) | (mask == 1)).all():
        message = "attention_mask holds other numbers than 0 and 1; it says of each token whether it is one"
        raise ConfigError(message)
