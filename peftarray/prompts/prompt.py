"""The protocol of prompts: arrays that a model reads beside its weights, and that change none of them.

A prompt is a frozen dataclass with PEFT's field names. Its arrays are a plain mapping, which `params` describes row by
row; `weights` makes of them what the model reads, by names that begin with `prompt.` or lie in the layers that are
adapted. What trains and what a file holds may differ: an encoder is left behind when its outputs are saved. So `params`
describes the first, `stored` the second, `to_store` goes from one to the other, and `weights` takes both.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from peftarray.arrays import Array, Params, constant, integers, namespace, wide
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.host import Host
from peftarray.settings import boolean, check_settings, name_list, one_of, optional, setting, text, whole

__all__ = ["COUNTS", "EMBEDDINGS", "KEY_VALUES", "TOKENS", "Prompt", "TokenPrompt", "VirtualTokens"]

TOKENS = "prompt.tokens"
"""The name of virtual tokens among a model's weights: rows `(n, width)` before a text's, or `(tasks, n, width)`."""
KEY_VALUES = "prompt.key_values"
"""The name of a prefix: `(2 * layers, groups, n, head width)`, the keys of a layer and then its values."""
COUNTS = "prompt.counts"
"""The name of how many virtual tokens are each text's own, a host array `(batch, 2)` of those of `TOKENS` and of
`KEY_VALUES`: the last of so many as the longest has. Both then have a row for each text: `(batch, n, width)`, and
`(2 * layers, batch, groups, n, head width)`."""
EMBEDDINGS = "prompt_embeddings"
"""What PEFT's files call virtual tokens, and a prefix as rows."""

_count = optional(whole(1))


@dataclass(frozen=True, kw_only=True)
class Prompt(ABC):
    """A prompt with its hyper-parameters; `adapter_config.json` is its serialised form. Subclasses are final."""

    peft_type: ClassVar[str]

    task_type: str | None = setting(None, text)
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = setting(None, text)
    base_model_name_or_path: str | None = setting(None, text)
    revision: str | None = setting(None, text)
    inference_mode: bool = setting(False, boolean)

    def __post_init__(self) -> None:
        check_settings(self)

    # What a prompt defines.

    @abstractmethod
    def params(self) -> dict[str, Param]:
        """The table of what trains, and of what is frozen beside it.

        Raises:
            ConfigError: a size is not known; `for_model` reads sizes from a model.
        """

    @abstractmethod
    def weights(self, p: Params, *, task_ids: Array | None = None, drop: Drop | None = None) -> dict[str, Array]:
        """What a model reads beside its weights; differentiable.

        Args:
            p: trained arrays, or stored ones.
            task_ids: the task of each text, `(batch,)`, for a prompt that has several.
            drop: while training, what the prompt's dropout draws by.

        Raises:
            ConfigError: the prompt needs tasks, or has none.
        """

    def stored(self) -> dict[str, Param]:
        """The table of what a file holds."""
        return self.params()

    def to_store(self, p: Params) -> dict[str, Array]:
        """What a file holds, made of trained arrays or of stored ones."""
        return {name: p[name] for name in self.stored()}

    def for_model(self, host: Host) -> Self:
        """The same prompt with the sizes of a model where it has none."""
        return self

    def source_file(self) -> str | None:
        """The file of a trained prompt that this one starts from."""
        return None

    def derive(
        self, like: Array, *, seed: int, embedding: Array | None, token_ids: Sequence[int] | None, source: Params | None
    ) -> dict[str, Array]:
        """First values that are not drawn; arguments as for `init_params`."""
        for given, what in ((token_ids, "token_ids"), (source, "source")):
            if given is not None:
                message = f"{type(self).__name__} with this configuration starts from no {what}; leave them out"
                raise ConfigError(message)
        return {}

    # What follows for every prompt.

    def init_params(
        self,
        like: Array,
        *,
        seed: int = 0,
        embedding: Array | None = None,
        token_ids: Sequence[int] | None = None,
        source: Params | None = None,
    ) -> dict[str, Array]:
        """First values of every array of the table.

        Args:
            like: an array of the model: its library, device and dtype (at least float32) are theirs.
            seed: of the draws; the same values on every library.
            embedding: the model's input embedding `(vocabulary, width)`, where the prompt starts from words.
            token_ids: the words that it starts from, as the model's tokenizer numbers them.
            source: the stored arrays of a trained prompt, where it starts from one.

        Raises:
            ConfigError: the configuration needs one of these, or has no use for it.
        """
        made = self.derive(like, seed=seed, embedding=embedding, token_ids=token_ids, source=source)
        for name, row in self.params().items():
            if name not in made:
                assert row.init is not None
                made[name] = constant(row.init(seed, f"prompt/{name}", sizes(row)), wide(like))
        return made

    def check_trainable(self, names: Collection[str]) -> None:
        """Check that arrays of these names are all that training goes on from.

        Raises:
            UnsupportedError: the file that they came from lacks what made the prompt.
        """
        gone = [name for name in self.params() if name not in names]
        if gone:
            message = (
                f"a saved {self.peft_type} prompt holds what its encoder made and not the encoder ({gone[0]} is gone), "
                "so training cannot go on; start a new one"
            )
            raise UnsupportedError(message)

    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(math.prod(sizes(row)) for row in self.params().values() if not row.frozen)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Check what a file holds against the table.

        Raises:
            MatchError: an array is missing or left over.
            ShapeError: an array has another shape.
        """
        table = self.stored()
        for name, shape in shapes.items():
            if name not in table:
                message = f"{where}: {name} has no place in {type(self).__name__}{nearest(name, table)}"
                raise MatchError(message)
            if tuple(shape) != table[name].shape:
                wanted = ", ".join(
                    f"{axis}={n}" for axis, n in zip(table[name].axes.split(), table[name].shape, strict=True)
                )
                message = (
                    f"{where}: {name} is {tuple(shape)}; the configuration wants ({wanted}): the two do not belong "
                    "together"
                )
                raise ShapeError(message)
        missing = [name for name in table if name not in shapes]
        if missing:
            message = f"{where}: the prompt lacks {', '.join(missing[:4])}; {type(self).__name__} needs it"
            raise MatchError(message)


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Prompt):
    """A prompt of so many virtual tokens; sizes that are None are those of the model (`for_model`).

    Attributes:
        num_virtual_tokens: how many, for each submodule.
        token_dim: the width of a token's row.
        num_transformer_submodules: 2 for an encoder with a decoder, which get tokens each.
        num_attention_heads: heads of the model.
        num_layers: layers of the model.
        modules_to_save: modules that are trained whole beside the prompt.
    """

    num_virtual_tokens: int | None = setting(None, _count)
    token_dim: int | None = setting(None, _count)
    num_transformer_submodules: int | None = setting(None, optional(one_of(1, 2)))
    num_attention_heads: int | None = setting(None, _count)
    num_layers: int | None = setting(None, _count)
    modules_to_save: list[str] | tuple[str, ...] | None = setting(None, name_list)

    def for_model(self, host: Host) -> Self:
        changes: dict[str, Any] = {
            "token_dim": host.width,
            "num_layers": host.layers,
            "num_attention_heads": host.heads,
            "num_transformer_submodules": self.submodules,
        }
        return dataclasses.replace(self, **{name: n for name, n in changes.items() if getattr(self, name) is None})

    @property
    def submodules(self) -> int:
        """How many parts of the model get virtual tokens."""
        return self.num_transformer_submodules or (2 if self.task_type == "SEQ_2_SEQ_LM" else 1)

    @property
    def total(self) -> int:
        """Virtual tokens of all submodules together."""
        return self.size("num_virtual_tokens") * self.submodules

    def size(self, field: str) -> int:
        """The value of a field that counts something.

        Raises:
            ConfigError: it is None.
        """
        value = getattr(self, field)
        if value is None:
            message = f"{type(self).__name__}.{field} is None; set it, or let for_model read it from a model"
            raise ConfigError(message)
        return int(value)


class TokenPrompt(VirtualTokens):
    """Virtual tokens as rows that stand before the embedded tokens of a text."""

    @abstractmethod
    def tokens(self, p: Params, *, drop: Drop | None = None) -> Array:
        """The rows `(total, token_dim)`, or `(tasks, total, token_dim)`; arguments as for `weights`."""

    def weights(self, p: Params, *, task_ids: Array | None = None, drop: Drop | None = None) -> dict[str, Array]:
        rows = self.tokens(p, drop=drop)
        if rows.ndim == 2:
            without_tasks(self, task_ids)
            return {TOKENS: rows}
        if task_ids is None:
            message = f"{type(self).__name__} has a prompt for each of {rows.shape[0]} tasks; give task_ids, one a text"
            raise ConfigError(message)
        if isinstance(task_ids, (list, tuple)):
            task_ids = integers(task_ids, rows)
        return {TOKENS: namespace(rows, task_ids).take(rows, task_ids, axis=0)}

    def stored(self) -> dict[str, Param]:
        return {EMBEDDINGS: Param("token dim", (self.total, self.size("token_dim")))}

    def to_store(self, p: Params) -> dict[str, Array]:
        return {EMBEDDINGS: self.tokens(p)}


def without_tasks(config: Prompt, task_ids: Array | None) -> None:
    """Refuse tasks where there is one prompt for all texts.

    Raises:
        ConfigError: some are given.
    """
    if task_ids is not None:
        message = f"{type(config).__name__} has one prompt for all texts; leave task_ids out"
        raise ConfigError(message)


def sizes(row: Param) -> tuple[int, ...]:
    """The shape of a row of a prompt's table, which knows all its sizes."""
    return tuple(n or 0 for n in row.shape)


def words(embedding: Array | None, token_ids: Sequence[int], what: str) -> Array:
    """Rows of the model's input embedding as first values, in float32 at least.

    Raises:
        ConfigError: there is no embedding, or it has no such row.
    """
    if embedding is None:
        message = f"{what} starts from the model's words; give embedding, its input embedding (vocabulary, width)"
        raise ConfigError(message)
    if not all(0 <= token < embedding.shape[0] for token in token_ids):
        message = f"{what}: the token numbers {list(token_ids)[:8]} must be 0 to {embedding.shape[0] - 1}"
        raise ConfigError(message)
    xp = namespace(embedding)
    rows = xp.take(embedding, integers(list(token_ids), embedding), axis=0)
    return xp.astype(rows, wide(embedding).dtype)
