"""BERT and the sentence encoders that are built as it is, MiniLM among them.

    x = layer_norm(x + attention(x)),  x = layer_norm(x + W_out gelu(W_in x))

Sources: Devlin et al., BERT, 2019, section 3, arXiv:1810.04805; Reimers and Gurevych, Sentence-BERT, 2019, section 3
(mean pooling), arXiv:1908.10084.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from peftarray.arrays import Array, constant, integers, namespace
from peftarray.autodiff.fused import attention, layer_norm
from peftarray.errors import ConfigError, MatchError, ShapeError
from peftarray.models.activations import ACTIVATIONS
from peftarray.models.cache import Pair, extended
from peftarray.models.config import read_config
from peftarray.models.heads import join_heads, split_heads
from peftarray.models.inputs import Tokens, score_mask, token_numbers, token_positions
from peftarray.models.linear import Weights, embedding, find, linear
from peftarray.models.model import Model, Tensor
from peftarray.models.prompt import behind, prefix, virtual_rows, virtual_tokens
from peftarray.random import normal_of
from peftarray.settings import check_settings, number, one_of, optional, refused, setting, whole

__all__ = ["Bert", "BertConfig"]

_TAILS = tuple(
    f"{name}.{part}"
    for name in (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *(
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ),
    )
    for part in ("weight", "bias")
)


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """What a `config.json` says, in its own words."""

    model_type: str = setting("bert", one_of("bert"))
    vocab_size: int = setting(30522, whole(1))
    hidden_size: int = setting(768, whole(1))
    num_hidden_layers: int = setting(12, whole(1))
    num_attention_heads: int = setting(12, whole(1))
    intermediate_size: int = setting(3072, whole(1))
    hidden_act: str = setting("gelu", one_of(*ACTIVATIONS))
    max_position_embeddings: int = setting(512, whole(1))
    type_vocab_size: int = setting(2, whole(1))
    layer_norm_eps: float = setting(1e-12, number(0.0))
    position_embedding_type: str | None = setting("absolute", optional(one_of("absolute")))
    pad_token_id: int | None = setting(0, optional(whole(0)))
    is_decoder: bool = refused(False, "this model reads in both directions")
    add_cross_attention: bool = refused(False, "this model reads one text")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.hidden_size % self.num_attention_heads:
            message = f"hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide"
            raise ConfigError(message)


class Bert(Model):
    """BERT: a vector for each token, for a text, and with a classifier the logits of its classes.

    Example:
        >>> from peftarray import models
        >>> model = models.create({"model_type": "bert", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2,
        ...                        "num_attention_heads": 2, "intermediate_size": 12})
        >>> model.embed(model.weights, [[1, 2, 3], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]]).shape
        (2, 8)
    """

    config: BertConfig
    usual_prefix: ClassVar[str] = "bert."
    tails: ClassVar[tuple[str, ...]] = _TAILS

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> BertConfig:
        return read_config(BertConfig, config)

    @classmethod
    def tensors(cls, config: BertConfig) -> Iterator[Tensor]:
        hidden, inner = config.hidden_size, config.intermediate_size
        sizes = {
            "word": config.vocab_size,
            "position": config.max_position_embeddings,
            "token_type": config.type_vocab_size,
        }
        for name, size in sizes.items():
            yield Tensor(f"embeddings.{name}_embeddings.weight", (size, hidden))
        yield Tensor("embeddings.LayerNorm.weight", (hidden,))
        yield Tensor("embeddings.LayerNorm.bias", (hidden,))
        wide = {"intermediate.dense.weight": (inner, hidden), "intermediate.dense.bias": (inner,)}
        wide["output.dense.weight"] = (hidden, inner)
        for layer in range(config.num_hidden_layers):
            for tail in _TAILS:
                usual = (hidden, hidden) if tail.endswith("weight") and "LayerNorm" not in tail else (hidden,)
                yield Tensor(f"encoder.layer.{layer}.{tail}", wide.get(tail, usual))
        yield Tensor("pooler.dense.weight", (hidden, hidden), needed=False)
        yield Tensor("pooler.dense.bias", (hidden,), needed=False)
        yield Tensor("classifier.weight", (None, hidden), needed=False, bare=True)
        yield Tensor("classifier.bias", (None,), needed=False, bare=True)

    def layer_name(self, number: int) -> str:
        return f"{self.prefix}encoder.layer.{number}"

    def __call__(
        self, weights: Weights, input_ids: Tokens, attention_mask: Any = None, *, token_type_ids: Any = None
    ) -> Array:
        """Logits of the classifier, `(batch, labels)`.

        Args:
            weights: name -> array; what `model.weights` holds, or what stands for it.
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding.
            token_type_ids: `(batch, length)`, which of two texts a token belongs to; all the first if None.

        Raises:
            MatchError: the weights have no classifier, or no pooler.
            PeftError: numbers beyond the vocabulary, too long a sequence, shapes that do not fit.
        """
        if "classifier.weight" not in weights:
            message = "the weights have no classifier.weight; add what model.new_classifier(labels) makes, and train it"
            raise MatchError(message)
        pooled = self.pool(
            weights, self.hidden_states(weights, input_ids, attention_mask, token_type_ids=token_type_ids)
        )
        return linear(weights, "classifier", pooled)

    def hidden_states(
        self, weights: Weights, input_ids: Tokens, attention_mask: Any = None, *, token_type_ids: Any = None
    ) -> Array:
        """A vector for each token, `(batch, length, width)`, behind those of a prompt; arguments as for the logits."""
        start, config = f"{self.prefix}embeddings", self.config
        like = find(weights, f"{start}.LayerNorm.weight")
        ids = token_numbers(input_ids, like, config.vocab_size)
        batch, length = ids.shape
        virtual = virtual_tokens(weights)
        rows = virtual_rows(weights, batch, config.hidden_size)
        heads = config.num_attention_heads
        earlier = prefix(weights, batch, config.num_hidden_layers, heads, config.hidden_size // heads)
        past, whole = virtual.pairs, virtual.rows + length
        places = virtual.placed(None, batch, 0, length, first=rows is not None)
        places = token_positions(places, batch, past, whole, config.max_position_embeddings)
        mask = score_mask(virtual.masked(attention_mask, like, batch, length), batch, past, whole, like)
        kinds = np.zeros((batch, length), np.int64) if token_type_ids is None else token_type_ids
        kinds = token_numbers(kinds, like, config.type_vocab_size, "token_type_ids")
        if tuple(kinds.shape) != (batch, length):
            message = f"token_type_ids are {tuple(kinds.shape)}; they must be {(batch, length)}, as input_ids are"
            raise ShapeError(message)
        x = embedding(weights, f"{start}.word_embeddings", namespace(ids).reshape(ids, (-1,)))
        x = x + embedding(weights, f"{start}.token_type_embeddings", namespace(kinds).reshape(kinds, (-1,)))
        if rows is not None:
            rows = rows + embedding(weights, f"{start}.token_type_embeddings", integers([0], like))
        x = behind(rows, x, batch)
        every = np.broadcast_to(places, (batch, whole)).reshape(-1)
        x = x + embedding(weights, f"{start}.position_embeddings", integers(every, like))
        x = self._norm(weights, f"{start}.LayerNorm", x)
        apply_layer = self.around(self._apply_layer)
        for layer in range(config.num_hidden_layers):
            x = apply_layer(self.layer(weights, layer), x, batch, mask, earlier[layer] if earlier else None)
        return namespace(x).reshape(x, (batch, whole, config.hidden_size))

    def pool(self, weights: Weights, hidden: Array) -> Array:
        """What the classifier reads: the first token through the pooler, `tanh(W h + b)`, `(batch, width)`.

        Raises:
            MatchError: the checkpoint has no pooler.
        """
        name = f"{self.prefix}pooler.dense"
        if f"{name}.weight" not in weights:
            message = f"the weights have no {name}.weight; use the mean of the tokens (embed), or another checkpoint"
            raise MatchError(message)
        batch, whole, width = hidden.shape
        virtual, first = virtual_tokens(weights), hidden[:, 0, :]
        if virtual.own is not None:
            rows = namespace(hidden).reshape(hidden, (-1, width))
            starts = virtual.rows - virtual.own[:, 0] + np.arange(batch) * whole
            first = namespace(rows).take(rows, integers(starts, rows), axis=0)
        pooled = linear(weights, name, first)
        return namespace(pooled).tanh(pooled)

    def embed(
        self,
        weights: Weights,
        input_ids: Tokens,
        attention_mask: Any = None,
        *,
        token_type_ids: Any = None,
        normalize: bool = True,
    ) -> Array:
        """A vector for each text, `(batch, width)`: the mean over its tokens, of length 1 where `normalize` is true.

        Cosine similarities of normalised vectors are `vectors @ vectors.T`. Other arguments as for the logits.
        """
        hidden = self.hidden_states(weights, input_ids, attention_mask, token_type_ids=token_type_ids)
        hidden = hidden[:, virtual_tokens(weights).rows :, :]
        xp = namespace(hidden)
        if attention_mask is None:
            mean = xp.mean(hidden, axis=1)
        else:
            kept = self._kept(attention_mask, find(weights, f"{self.prefix}embeddings.LayerNorm.weight"))
            number = xp.sum(kept, axis=-1, keepdims=True)
            mean = (kept[:, None, :] @ hidden)[:, 0, :] / number
        return mean / xp.sqrt(xp.sum(mean * mean, axis=-1, keepdims=True)) if normalize else mean

    def new_classifier(self, labels: int, *, seed: int = 0) -> dict[str, Array]:
        """A classifier to be trained, to be added to the weights: normal numbers of deviation 0.02, and zero biases."""
        width = self.config.hidden_size
        like = self.weights[f"{self.prefix}embeddings.LayerNorm.weight"]
        matrix = normal_of(0.02)(seed, "classifier.weight", (labels, width))
        return {
            "classifier.weight": constant(matrix, like),
            "classifier.bias": constant(np.zeros(labels, np.float32), like),
        }

    @staticmethod
    def _kept(attention_mask: Any, like: Array) -> Array:
        if isinstance(attention_mask, (list, tuple, np.ndarray)):
            return constant(np.asarray(attention_mask), like)
        return namespace(attention_mask, like).astype(attention_mask, like.dtype)

    def _apply_layer(self, part: Weights, x: Array, batch: int, mask: Array | None, before: Pair | None) -> Array:
        """One layer on rows `(batch * length, width)`."""
        q, k, v = (
            split_heads(linear(part, f"attention.self.{name}", x), batch, self.config.num_attention_heads)
            for name in ("query", "key", "value")
        )
        k, v = extended(before, k, v)
        seen = linear(part, "attention.output.dense", join_heads(attention(q, k, v, mask)))
        x = self._norm(part, "attention.output.LayerNorm", x + seen)
        inner = ACTIVATIONS[self.config.hidden_act](linear(part, "intermediate.dense", x))
        return self._norm(part, "output.LayerNorm", x + linear(part, "output.dense", inner))

    def _norm(self, weights: Weights, name: str, x: Array) -> Array:
        return layer_norm(
            x, find(weights, f"{name}.weight"), find(weights, f"{name}.bias"), eps=self.config.layer_norm_eps
        )
