"""Writing on: the next token chosen by a decoder, again and again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from peftarray.arrays import namespace, to_host
from peftarray.errors import ConfigError, PeftError
from peftarray.models.cache import Cache
from peftarray.models.inputs import Tokens
from peftarray.models.linear import Weights
from peftarray.models.prompt import virtual_tokens
from peftarray.random import uniform

if TYPE_CHECKING:
    from peftarray.models.model import Decoder

__all__ = ["generate", "probabilities"]


def generate(
    model: Decoder,
    weights: Weights,
    input_ids: Tokens,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Collection[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The prompts and what the model writes after them.

    Each step brings to the host what it needs there: the chosen tokens, or the last logits where tokens are drawn. The
    same seed draws the same tokens from the same logits on every library.

    Args:
        model: a decoder.
        weights: name -> array.
        input_ids: prompts `(batch, length)`, as lists or a host array.
        attention_mask: `(batch, length)`, 0 for padding, which stands before the prompts.
        max_new_tokens: how many tokens at most.
        eos_token_id: tokens that end a text; those that the checkpoint names if None, and none if empty.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from `softmax(logits / temperature)`.
        top_k: draws among the so many likeliest tokens alone.
        top_p: draws among the likeliest tokens that together reach this probability.
        seed: of the draws.

    Returns:
        A NumPy array `(batch, length + n)`, with the padding token (or the end's) after the end of each text.

    Raises:
        ConfigError: a setting that is not allowed, or that would change nothing.
        PeftError: prompts and new tokens are longer than the model takes; padding stands behind a prompt.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    texts = np.asarray(to_host(input_ids) if hasattr(input_ids, "dtype") else input_ids)
    mask = _prompt_mask(attention_mask, texts)
    if virtual_tokens(weights).total + texts.shape[-1] + max_new_tokens > model.limit:
        message = (
            f"{texts.shape[-1]} tokens and {max_new_tokens} new ones are more than the {model.limit} that this model "
            "takes; ask for less"
        )
        raise PeftError(message)
    ends = _ends(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    padding = model.config.pad_token_id
    padding = padding if padding is not None else ends[0] if ends else 0
    choose = _likeliest if temperature == 0 else _drawn(temperature, top_k, top_p, seed)

    cache, new = Cache(), texts
    running = np.ones(len(texts), np.bool_)
    for step in range(max_new_tokens):
        places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -new.shape[1] :]
        hidden, cache = model.step(weights, new, cache, mask, positions=places)
        chosen = np.where(running, choose(model.logits(weights, hidden[:, -1, :]), step), padding)
        running &= ~np.isin(chosen, ends)
        new = chosen[:, None]
        texts = np.concatenate([texts, new], axis=1)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        if not running.any():
            break
    return texts


def probabilities(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """What tokens are drawn with: `softmax(logits / temperature)`, cut to the likeliest, in float64.

    Source: Fan et al., Hierarchical Neural Story Generation, 2018, section 5.4 (top k), arXiv:1805.04833; Holtzman et
    al., The Curious Case of Neural Text Degeneration, 2020, section 3.1 (top p), arXiv:1904.09751.

    Example:
        >>> probabilities(np.log([[0.5, 0.3, 0.2]]), 1.0, None, 0.7).round(3).tolist()
        [[0.625, 0.375, 0.0]]
    """
    scores = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = np.partition(scores, -top_k, axis=-1)[:, -top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    if top_p is not None:
        order = np.argsort(-share, axis=-1, kind="stable")
        sorted_share = np.take_along_axis(share, order, axis=-1)
        above = np.cumsum(sorted_share, axis=-1) - sorted_share
        np.put_along_axis(share, order, np.where(above < top_p, sorted_share, 0.0), axis=-1)
        share /= share.sum(axis=-1, keepdims=True)
    return share


def _likeliest(logits: Any, step: int) -> np.ndarray:
    return to_host(namespace(logits).argmax(logits, axis=-1))


def _drawn(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> Callable[[Any, int], np.ndarray]:
    def choose(logits: Any, step: int) -> np.ndarray:
        sums = np.cumsum(probabilities(to_host(logits), temperature, top_k, top_p), axis=-1)
        draws = uniform(seed, f"token/{step}", (len(sums),)).astype(np.float64)
        # The first token whose sum is beyond the draw; the last sum stands for 1.
        return (sums <= draws[:, None] * sums[:, -1:]).sum(axis=-1)

    return choose


def _ends(given: int | Collection[int] | None) -> list[int]:
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)


def _prompt_mask(given: Any, texts: np.ndarray) -> np.ndarray:
    if given is None:
        return np.ones(texts.shape, np.int64)
    mask = np.asarray(to_host(given) if hasattr(given, "dtype") else given).astype(np.int64)
    if mask.shape == texts.shape and (mask[:, -1] == 0).any():
        message = "a prompt ends in padding, and the model would go on from that; put the padding before the prompts"
        raise PeftError(message)
    return mask


def _check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    allowed = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (temperature, temperature >= 0, "0 or more"),
        "top_k": (top_k, top_k is None or top_k >= 1, "None or at least 1"),
        "top_p": (top_p, top_p is None or 0 < top_p <= 1, "None, or above 0 and at most 1"),
    }
    for name, (value, fits, words) in allowed.items():
        if not fits:
            message = f"{name} is {value!r}; it must be {words}"
            raise ConfigError(message)
    if temperature == 0 and (top_k is not None or top_p is not None):
        message = (
            "top_k and top_p choose what is drawn, and a temperature of 0 draws nothing; give a temperature above 0"
        )
        raise ConfigError(message)
