"""What every reference model is: its configuration, its weights by name, and functions of such weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from peftarray.arrays import Array, namespace, weight_product
from peftarray.errors import MatchError, UnsupportedError
from peftarray.method import AdapterConfig
from peftarray.methods import TrainableTokensConfig
from peftarray.models.cache import Cache, Pair
from peftarray.models.generation import generate
from peftarray.models.inputs import Tokens, score_mask, token_numbers, token_positions
from peftarray.models.linear import Weights, find
from peftarray.models.prompt import behind, prefix, virtual_rows, virtual_tokens
from peftarray.prompts.prompt import KEY_VALUES, TOKENS
from peftarray.stand_in import StandIn

__all__ = ["HEAD", "Decoder", "Model", "Tensor"]

HEAD = "lm_head.weight"
"""A head's own weight, where it has one."""


class Tensor(NamedTuple):
    """A row of the table of a model's weights.

    Attributes:
        name: on disk, without the prefix of the whole model where `bare` is false.
        shape: None for a size that the file decides.
        needed: whether a checkpoint without it is refused.
        bare: whether it stands outside of the prefix, as heads do.
        stand_in: the weight that is used in its place where the file has none, or the same; none if empty.
    """

    name: str
    shape: tuple[int | None, ...]
    needed: bool = True
    bare: bool = False
    stand_in: str = ""


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return function


@dataclass(frozen=True, eq=False)
class Model(ABC):
    """A model as functions of its weights: `model(weights, input_ids)` reads nothing else that could be trained.

    Attributes:
        config: what `config.json` says.
        weights: name -> array, the names of the checkpoint.
        prefix: before every name that is not a head's: empty where the file was saved without a head.
        left_out: tensors of the checkpoint that this model does not use.
        around: what the function of each layer is wrapped in, such as `peftarray.autodiff.checkpoint`.
        facts: the whole of `config.json`, for the one that `save` writes.
    """

    config: Any
    weights: Weights
    prefix: str
    left_out: tuple[str, ...] = ()
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = as_it_is
    facts: Mapping[str, Any] = field(default_factory=dict)

    usual_prefix: ClassVar[str]
    tails: ClassVar[tuple[str, ...]]
    """The ends of the names of a layer's weights."""
    prompts: ClassVar[tuple[str, ...]] = (TOKENS, KEY_VALUES)
    """The prompts that it reads where the weights hold them."""

    @classmethod
    @abstractmethod
    def read(cls, config: Mapping[str, Any]) -> Any:
        """The configuration in a `config.json`."""

    @classmethod
    @abstractmethod
    def tensors(cls, config: Any) -> Iterator[Tensor]:
        """Every weight that the model may have."""

    @abstractmethod
    def __call__(self, weights: Weights, input_ids: Tokens, attention_mask: Any = None) -> Array:
        """Logits."""

    def layer(self, weights: Weights, number: int) -> dict[str, Array]:
        """The weights of one layer by the ends of their names, without those that it does not have."""
        start = self.layer_name(number)
        found = {}
        for tail in self.tails:
            name = f"{start}.{tail}"
            if name in weights or name in self.weights:
                found[tail] = find(weights, name)
        return found

    @abstractmethod
    def layer_name(self, number: int) -> str:
        """The name of a layer's module."""

    def reads(self, name: str) -> bool:
        """Whether the model reads what a prompt puts among its weights under this name."""
        return name in self.prompts or any(name.endswith(f".{tail}") for tail in self.tails)


class Decoder(Model):
    """A language model: each token sees those before it, and its row says what comes next."""

    input_embedding: ClassVar[str]
    """The weight that stands for the head where the two are tied."""

    def __call__(
        self, weights: Weights, input_ids: Tokens, attention_mask: Any = None, *, positions: Any = None
    ) -> Array:
        """Logits of what comes after each token, `(batch, length, vocabulary)`.

        Args:
            weights: name -> array; what `model.weights` holds, or what stands for it.
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding.
            positions: the place of each token in its text; 0, 1, 2 and so on if None.

        Raises:
            PeftError: numbers beyond the vocabulary, too long a sequence, shapes that do not fit.
        """
        return self.logits(weights, self.hidden_states(weights, input_ids, attention_mask, positions=positions))

    def hidden_states(
        self,
        weights: Weights,
        input_ids: Tokens,
        attention_mask: Any = None,
        *,
        positions: Any = None,
        with_prompt: bool = False,
    ) -> Array:
        """What the head reads, `(batch, length, width)`; arguments as for the logits.

        With `with_prompt` the rows of virtual tokens that the weights hold come first.
        """
        return self._run(weights, input_ids, attention_mask, positions, None, with_prompt=with_prompt)[0]

    def step(
        self,
        weights: Weights,
        input_ids: Tokens,
        cache: Cache,
        attention_mask: Any = None,
        *,
        positions: Any = None,
    ) -> tuple[Array, Cache]:
        """`hidden_states` of tokens that come after those in `cache`, and the cache with them.

        Args:
            weights, input_ids: as for the logits.
            cache: of the tokens before; `Cache()` at the start.
            attention_mask: for the tokens before as well, `(batch, cache.length + length)` where there is no prompt.
            positions: counted on from those tokens if None.
        """
        hidden, pairs = self._run(weights, input_ids, attention_mask, positions, cache)
        return hidden, Cache(pairs)

    def logits(self, weights: Weights, hidden: Array) -> Array:
        """The head on hidden states `(..., width)`: `(..., vocabulary)`."""
        rows = namespace(hidden).reshape(hidden, (-1, hidden.shape[-1]))
        found = weight_product(rows, self.head(weights))
        return namespace(found).reshape(found, (*hidden.shape[:-1], -1))

    def head(self, weights: Weights) -> Array:
        """The head's matrix `(vocabulary, width)`, which may be that of the embedding.

        Raises:
            MatchError: the checkpoint has none.
        """
        if HEAD in weights:
            return weights[HEAD]
        if not self.config.tie_word_embeddings:
            message = f"the weights have no {HEAD}, and config.json says that it is not tied; load a language model"
            raise MatchError(message)
        return _shared(find(weights, self.prefix + self.input_embedding))

    def untied(self, weights: Weights) -> dict[str, Array]:
        """The head's matrix by its name, where it would be the embedding's but for an adapter that this one has."""
        embedding, head = find(weights, self.prefix + self.input_embedding), self.head(weights)
        if HEAD in weights or head is embedding:
            return {}
        return {HEAD: head.dense() if isinstance(head, StandIn) else head}

    generate = generate

    def _run(
        self,
        weights: Weights,
        input_ids: Tokens,
        attention_mask: Any,
        positions: Any,
        cache: Cache | None,
        *,
        with_prompt: bool = False,
    ) -> tuple[Array, tuple[Pair, ...]]:
        """Hidden states of tokens after those in `cache`, and the keys and values of all; none of these without one."""
        config = self.config
        like = self.like(weights)
        ids = token_numbers(input_ids, like, config.vocab_size)
        batch, length = ids.shape
        earlier, rows = (cache.layers if cache else ()), None
        virtual = virtual_tokens(weights)
        windows = {config.window(number) for number in range(config.depth)}
        if virtual.rows and virtual.pairs and windows != {None}:
            message = f"{type(self).__name__} sees a window of tokens, so a batch has virtual tokens of one kind"
            raise UnsupportedError(message)
        fresh = not earlier
        if virtual.total and fresh:
            earlier = prefix(weights, batch, config.depth, *self.heads_of_keys)
            rows = virtual_rows(weights, batch, find(weights, self.prefix + self.input_embedding).shape[1])
        past = earlier[0][0].shape[2] if earlier else 0
        known = past - (virtual.pairs if fresh else virtual.total)
        attention_mask = virtual.masked(attention_mask, like, batch, known + length)
        positions = virtual.placed(positions, batch, known, length, first=rows is not None)
        text = length
        length += virtual.rows if rows is not None else 0
        own = length if with_prompt else text
        places = token_positions(positions, batch, past, length, self.limit)
        masks = {window: score_mask(attention_mask, batch, past, length, like, window=window) for window in windows}
        aids = self.aids(places, like)
        x = behind(rows, self.embed(weights, namespace(ids).reshape(ids, (-1,))), batch)
        x = self.place(weights, x, places)
        layer = self.around(self.apply_layer)
        pairs = []
        for number in range(config.depth):
            part = self.layer(weights, number)
            before = earlier[number] if earlier else None
            x, pair = layer(part, x, batch, number, masks[config.window(number)], aids, before)
            if cache is not None:
                pairs.append(pair)
        x = self.finish(weights, x)
        x = namespace(x).reshape(x, (batch, length, -1))
        return (x[:, length - own :, :] if length > own else x), tuple(pairs)

    @property
    @abstractmethod
    def limit(self) -> int:
        """The longest sequence that the model takes."""

    @abstractmethod
    def like(self, weights: Weights) -> Array:
        """A weight whose library, device and dtype are those of the activations."""

    @abstractmethod
    def aids(self, places: np.ndarray, like: Array) -> tuple[Array, ...]:
        """What all layers read beside their weights, from the place of each token."""

    @property
    @abstractmethod
    def heads_of_keys(self) -> tuple[int, int]:
        """How many, and how many channels each has."""

    @abstractmethod
    def embed(self, weights: Weights, ids: Array) -> Array:
        """The rows of tokens, one for each of `ids` `(batch * length,)`."""

    def place(self, weights: Weights, x: Array, places: np.ndarray) -> Array:
        """The rows that the first layer reads, made of those of tokens `(batch * length, width)`."""
        return x

    @abstractmethod
    def apply_layer(
        self,
        part: Weights,
        x: Array,
        batch: int,
        number: int,
        mask: Array | None,
        aids: tuple[Array, ...],
        before: Pair | None,
    ) -> tuple[Array, Pair]:
        """One layer on rows `(batch * length, width)`, and its keys and values."""

    @abstractmethod
    def finish(self, weights: Weights, x: Array) -> Array:
        """What stands between the last layer and the head."""


def _shared(embedding: Array) -> Array:
    """An embedding as a head sees it that is tied to it: without adapters that are the embedding's alone."""
    return embedding.kept(_follows_ties) if isinstance(embedding, StandIn) else embedding


def _follows_ties(method: AdapterConfig) -> bool:
    return method.keeps_tied() or method.peft_type == TrainableTokensConfig.peft_type
