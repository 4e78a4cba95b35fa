"""Where a soft prompt stands among the arguments of a model of transformers: rows before a text's, keys before its own.

Arguments are mappings by the names that such models have. What a cache holds already stands behind the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftarray.errors import ConfigError, ShapeError, UnsupportedError

__all__ = [
    "Inputs",
    "alone",
    "filled_cache",
    "is_behind",
    "per_text",
    "scored_at_the_end",
    "text_size",
    "with_keys",
    "with_labels",
    "with_rows",
]

Inputs = dict[str, Any]
_BY_ROW = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
"""What a model says of each token, and how many axes it has where it does."""


def text_size(given: Mapping[str, Any], side: str = "") -> tuple[int, int]:
    """How many texts there are, and how long they are; `side` is `"decoder_"` for those of a decoder.

    Raises:
        ConfigError: there are none.
    """
    for name in (f"{side}input_ids", f"{side}inputs_embeds"):
        if given.get(name) is not None:
            return given[name].shape[0], given[name].shape[1]
    message = f"neither {side}input_ids nor {side}inputs_embeds is given; a soft prompt stands before a text"
    raise ConfigError(message)


def is_behind(given: Mapping[str, Any]) -> bool:
    """Whether the prompt was read before: its keys, and those of a text's beginning, are in the cache."""
    cache = given.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def per_text(prompt: torch.Tensor, batch: int) -> torch.Tensor:
    """A prompt `(n, ...)`, or one for each text `(texts, n, ...)`, for a batch where each text may stand in several
    beams.

    Raises:
        ShapeError: there are prompts for another number of texts.
    """
    if prompt.ndim == 2:
        return prompt.expand(batch, *prompt.shape)
    if batch % prompt.shape[0]:
        message = f"task_ids are for {prompt.shape[0]} texts, and there are {batch}; give one a text"
        raise ShapeError(message)
    return prompt.repeat_interleave(batch // prompt.shape[0], dim=0)


def with_rows(
    given: Inputs, rows: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], side: str = ""
) -> Inputs:
    """The arguments with rows before those of each text.

    Args:
        given: the arguments.
        rows: `(n, width)`, or `(texts, n, width)`.
        embed: token numbers -> their rows.
        side: `"decoder_"` where they are a decoder's.
    """
    changed, count = dict(given), rows.shape[-2]
    if is_behind(given):
        return _moved(changed, count, side, *text_size(given, side), behind=True)
    batch, length = text_size(given, side)
    ids, own = changed.pop(f"{side}input_ids", None), changed.get(f"{side}inputs_embeds")
    own = embed(ids) if own is None else own
    changed[f"{side}inputs_embeds"] = torch.cat([per_text(rows, batch).to(own), own], dim=1)
    return _moved(changed, count, side, batch, length, behind=False)


def with_keys(given: Inputs, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], side: str = "") -> Inputs:
    """The arguments with keys and values `(groups, n, width)`, a pair for each layer, before those of the text."""
    changed, (batch, length) = dict(given), text_size(given, side)
    behind = is_behind(given)
    if not behind:
        changed["past_key_values"] = filled_cache(changed.get("past_key_values"), pairs, batch, double=bool(side))
    return _moved(changed, pairs[0][0].shape[1], side, batch, length, behind=behind, is_cache=True)


def filled_cache(cache: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], batch: int, *, double: bool) -> Any:
    """A cache, the given one if it is not None, that holds keys and values for each text.

    Args:
        cache: an empty one.
        pairs: of each layer.
        batch: how many texts there are.
        double: whether it is that of an encoder with a decoder.

    Raises:
        UnsupportedError: a cache of that kind cannot hold them.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if double else DynamicCache()
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, DynamicCache):
        message = (
            f"a prefix goes into a DynamicCache, and the model brings a {type(own).__name__}; leave out which cache"
        )
        raise UnsupportedError(message)
    for layer, (keys, values) in enumerate(pairs):
        own.update(keys.expand(batch, *keys.shape), values.expand(batch, *values.shape), layer)
    return cache


def with_labels(given: Inputs, count: int, *, of_texts: bool = False) -> Inputs:
    """The arguments with labels, and places in the text, behind so many virtual tokens without one.

    Args:
        given: the arguments.
        count: virtual tokens.
        of_texts: whether a label is that of a text, and not of a token.
    """
    changed = dict(given)
    labels = changed.get("labels")
    if labels is not None and not of_texts:
        changed["labels"] = _before(labels, torch.full((labels.shape[0], count), -100))
    for name in ("start_positions", "end_positions"):
        if changed.get(name) is not None:
            changed[name] = changed[name] + count
    return changed


def alone(output: Any, length: int) -> Any:
    """A model's output, with what it says of each token for the last `length` of them: those of the text."""
    changed = dict(output.items())
    for name, axes in _BY_ROW.items():
        if name in changed and changed[name].ndim == axes and changed[name].shape[1] > length:
            changed[name] = changed[name][:, -length:]
    return type(output)(**changed)


@contextmanager
def scored_at_the_end(module: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Decoders that classify a text read its last token, which they find by its number; here they get rows alone, and
    would read whatever is last, such as padding. In this context their scores are those of the text's last token.
    """
    score, ids = getattr(module, "score", None), given.get("input_ids")
    config: Any = getattr(module, "config", None)
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    if not isinstance(score, nn.Module) or ids is None or padding is None:
        yield
        return
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    from_end = ids.shape[1] - (places * (ids != padding)).amax(dim=1).clamp(min=1)

    def last(_: nn.Module, __: Any, scores: torch.Tensor) -> torch.Tensor:
        rows = (scores.shape[1] - 1 - from_end).to(scores.device)
        return scores[torch.arange(len(rows), device=scores.device), rows][:, None]

    handle = score.register_forward_hook(last)
    try:
        yield
    finally:
        handle.remove()


def _moved(
    given: Inputs, count: int, side: str, batch: int, length: int, *, behind: bool, is_cache: bool = False
) -> Inputs:
    """Masks, positions and kinds of tokens for texts that stand behind so many virtual tokens."""
    mask = given.get(f"{side}attention_mask")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            message = (
                f"{side}attention_mask must be (batch, length), 1 for tokens and 0 for padding, to go with a prompt"
            )
            raise ShapeError(message)
        whole = length + given["past_key_values"].get_seq_length() if behind else None
        if mask.shape[1] != whole:
            given[f"{side}attention_mask"] = _before(mask, torch.ones(batch, count))
    positions = given.get(f"{side}position_ids")
    if positions is not None:
        moved, own = positions + count, torch.arange(count)
        in_rows = not (behind or is_cache)
        given[f"{side}position_ids"] = _before(moved, own.expand(*moved.shape[:-1], count)) if in_rows else moved
    kinds = given.get(f"{side}token_type_ids")
    if kinds is not None and not (behind or is_cache):
        given[f"{side}token_type_ids"] = _before(kinds, torch.zeros(batch, count))
    return given


def _before(array: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    return torch.cat([first.to(array), array], dim=-1)
