"""Losses of the reference models: `loss(weights, batch)`, a number, for training.

A batch is a mapping. It holds `input_ids` and, where there is padding, `attention_mask`, as the models take them, and
`labels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peftarray.arrays import Array, constant, integers, namespace
from peftarray.autodiff.fused import linear_cross_entropy, log_softmax
from peftarray.autodiff.fused.cross_entropy import frozen_cross_entropy
from peftarray.errors import ShapeError
from peftarray.models.bert import Bert
from peftarray.models.linear import Weights
from peftarray.models.model import Decoder
from peftarray.prompts import CPTConfig
from peftarray.routes import Weight

__all__ = ["Loss", "causal_loss", "classification_loss", "cpt_loss", "regression_loss"]

Loss = Callable[[Weights, Mapping[str, Any]], Array]

_IGNORED = -100


def causal_loss(model: Decoder) -> Loss:
    """The mean cross-entropy of each next token, without an array of all logits.

    Labels are `(batch, length)`, the tokens themselves; what is -100 does not count. Without labels every token counts
    that is no padding, and comes after one that is none.

    Example:
        >>> from peftarray import models
        >>> model = models.create({"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2})
        >>> loss = causal_loss(model)
        >>> round(float(loss(model.weights, {"input_ids": [[1, 2, 3, 4]]})), 1)  # log 11
        2.4
    """

    def loss(weights: Weights, batch: Mapping[str, Any]) -> Array:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        hidden = model.hidden_states(weights, ids, mask)
        labels = _beside(batch["labels"], hidden) if "labels" in batch else _unpadded(ids, mask, hidden)
        _check(labels, hidden.shape[:2], "(batch, length)")
        rows, wanted, head = hidden[:, :-1, :], labels[:, 1:], model.head(weights)
        if isinstance(head, Weight) and head.is_packed:
            return frozen_cross_entropy(rows, wanted, weight=head, ignore_index=_IGNORED)
        return linear_cross_entropy(rows, head, wanted, ignore_index=_IGNORED)

    return loss


def cpt_loss(model: Decoder, config: CPTConfig) -> Loss:
    """The loss of context-aware prompt tuning: the labels of the prompt's examples count beside those of the text.

    A batch is as for `causal_loss`, and may hold `input_type_mask`, which `CPTConfig.labelled` explains. The weights
    are those of a `PromptModel` with this configuration; `CPTConfig.weighted_loss` says how labels are weighted.
    """

    def loss(weights: Weights, batch: Mapping[str, Any]) -> Array:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        hidden = model.hidden_states(weights, ids, mask, with_prompt=True)
        logits = model.logits(weights, hidden)
        given = _beside(batch["labels"], hidden) if "labels" in batch else _unpadded(ids, mask, hidden)
        _check(given, (hidden.shape[0], hidden.shape[1] - config.total), "(batch, length)")
        types = batch.get("input_type_mask")
        labels, types = config.labelled(given, None if types is None else _beside(types, hidden))
        return config.weighted_loss(logits, labels, types)

    return loss


def classification_loss(model: Bert) -> Loss:
    """The mean cross-entropy of the classifier; labels are `(batch,)`, the number of a class each."""

    def loss(weights: Weights, batch: Mapping[str, Any]) -> Array:
        logits = _logits(model, weights, batch)
        if logits.shape[1] < 2:
            message = (
                "the classifier has one output, whose cross-entropy is always 0; use regression_loss, or two classes"
            )
            raise ShapeError(message)
        shares = log_softmax(logits)
        labels = _beside(batch["labels"], shares)
        _check(labels, shares.shape[:1], "(batch,)")
        xp = namespace(shares)
        return -xp.mean(xp.take_along_axis(shares, labels[:, None], axis=-1))

    return loss


def regression_loss(model: Bert) -> Loss:
    """The mean square of the classifier's errors; labels are `(batch, outputs)`, or `(batch,)` for one output."""

    def loss(weights: Weights, batch: Mapping[str, Any]) -> Array:
        found = _logits(model, weights, batch)
        given = batch["labels"]
        if isinstance(given, (list, tuple, np.ndarray)):
            given = constant(np.asarray(given), found)
        wanted = given[:, None] if len(given.shape) == 1 else given
        _check(wanted, found.shape, "(batch, outputs)")
        return namespace(found, wanted).mean((found - wanted) ** 2)

    return loss


def _logits(model: Bert, weights: Weights, batch: Mapping[str, Any]) -> Array:
    return model(weights, batch["input_ids"], batch.get("attention_mask"), token_type_ids=batch.get("token_type_ids"))


def _beside(labels: Any, like: Array) -> Array:
    """Whole numbers where the activations lie."""
    return integers(np.asarray(labels), like) if isinstance(labels, (list, tuple, np.ndarray)) else labels


def _unpadded(ids: Any, mask: Any, like: Array) -> Array:
    """Tokens as labels; none of padding, and none that only padding comes before."""
    ids = _beside(ids, like)
    if mask is None:
        return ids
    mask = _beside(mask, like)
    xp = namespace(ids, mask)
    real = mask != 0
    return xp.where(real & xp.concat([real[:, :1], real[:, :-1]], axis=1), ids, _IGNORED)


def _check(labels: Array, shape: tuple[int, ...], words: str) -> None:
    if tuple(labels.shape) != tuple(shape):
        message = f"labels are {tuple(labels.shape)}; they must be {tuple(shape)}, {words}"
        raise ShapeError(message)
