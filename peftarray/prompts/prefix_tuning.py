"""Prefix tuning: keys and values that are trained stand before those of the text, in every layer.

Source: Li and Liang, Prefix-Tuning, 2021, sections 4.2 and 4.3, arXiv:2101.00190; without the projection: Liu et al.,
P-Tuning v2, 2021, section 3, arXiv:2110.07602.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from peftarray.arrays import Array, Params, namespace
from peftarray.errors import ConfigError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.encoders import linear, linear_params
from peftarray.prompts.host import Host
from peftarray.prompts.prompt import EMBEDDINGS, KEY_VALUES, VirtualTokens, without_tasks
from peftarray.random import normal, zeros
from peftarray.settings import boolean, one_of, optional, setting, whole

__all__ = ["PrefixTuningConfig"]

_SEEDS = "embedding.weight"
_LAST = "transform.2"


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(VirtualTokens):
    """Row i of `prompt_embeddings (n, layers * 2 * token_dim)` is the keys and values of virtual token i.

    A row is, layer after layer, the key and then the value, each `num_attention_heads` heads of `token_dim /
    num_attention_heads` channels. Where the model's configuration counts heads of keys, these are meant: `for_model`
    then sets `num_attention_heads` and `token_dim = heads * head width` by them, whatever was given, as PEFT does.

    With `prefix_projection` the rows are `W_2 tanh(W_1 e + b_1) + b_2`, with e a row of `embedding.weight (n,
    token_dim)`; a file holds the rows alone. At initialisation the rows (or e) are standard normal; with `init_weights`
    `"zero"` the rows are zero. Even then a prefix takes its share of the attention, and is not the identity.

    Attributes:
        init_weights: None or `"zero"`.
        encoder_hidden_size: inner width of the projection; `token_dim` if None.
        prefix_projection: whether there is a projection.

    Example:
        >>> import numpy as np
        >>> config = PrefixTuningConfig(num_virtual_tokens=3, token_dim=8, num_attention_heads=2, num_layers=5)
        >>> pairs = config.key_values(config.init_params(np.ones(1, np.float32)))
        >>> len(pairs), pairs[0][0].shape
        (5, (2, 3, 4))
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    init_weights: str | None = setting(None, optional(one_of("zero")))
    encoder_hidden_size: int | None = setting(None, optional(whole(1)))
    prefix_projection: bool = setting(False, boolean)

    def for_model(self, host: Host) -> Self:
        known = super().for_model(host)
        if host.groups is not None:
            width = host.groups * host.head_width
            known = dataclasses.replace(known, token_dim=width, num_attention_heads=host.groups)
        return dataclasses.replace(known, encoder_hidden_size=self.encoder_hidden_size or known.token_dim)

    def params(self) -> dict[str, Param]:
        if not self.prefix_projection:
            row = self.stored()[EMBEDDINGS]
            return {EMBEDDINGS: dataclasses.replace(row, init=zeros if self.init_weights == "zero" else normal)}
        dim, hidden = self.size("token_dim"), self.encoder_hidden_size or self.size("token_dim")
        last = linear_params(_LAST, hidden, self._row)
        if self.init_weights == "zero":
            last = {name: dataclasses.replace(row, init=zeros) for name, row in last.items()}
        seeds = {_SEEDS: Param("token dim", (self.size("num_virtual_tokens"), dim), init=normal)}
        return seeds | linear_params("transform.0", dim, hidden) | last

    def stored(self) -> dict[str, Param]:
        return {EMBEDDINGS: Param("token row", (self.size("num_virtual_tokens"), self._row))}

    def to_store(self, p: Params) -> dict[str, Array]:
        return {EMBEDDINGS: self.rows(p)}

    def weights(self, p: Params, *, task_ids: Array | None = None, drop: Drop | None = None) -> dict[str, Array]:
        without_tasks(self, task_ids)
        return {KEY_VALUES: self.stacked(p)}

    def rows(self, p: Params) -> Array:
        """What a file holds, `(n, layers * 2 * token_dim)`."""
        if EMBEDDINGS in p:
            return p[EMBEDDINGS]
        hidden = linear(p, "transform.0", p[_SEEDS])
        return linear(p, _LAST, namespace(hidden).tanh(hidden))

    def stacked(self, p: Params) -> Array:
        """Keys and values of all layers, `(2 * layers, heads, n, head width)`: the keys of a layer, then its values."""
        heads, dim, layers = (self.size(name) for name in ("num_attention_heads", "token_dim", "num_layers"))
        if dim % heads:
            message = f"PrefixTuningConfig.token_dim is {dim}, which {heads} attention heads do not divide"
            raise ConfigError(message)
        rows = self.rows(p)
        xp = namespace(rows)
        return xp.permute_dims(xp.reshape(rows, (-1, 2 * layers, heads, dim // heads)), (1, 2, 0, 3))

    def key_values(self, p: Params) -> list[tuple[Array, Array]]:
        """For each layer its keys and its values, `(heads, n, head width)` each.

        In a model with two submodules layer i has those of number `2 i % layers`, in encoder and decoder: so PEFT reads
        its own rows there, and with an even number of layers never reads half of them.
        """
        stacked, layers = self.stacked(p), self.size("num_layers")
        places = [self.submodules * i % layers for i in range(layers)]
        return [(stacked[2 * i, ...], stacked[2 * i + 1, ...]) for i in places]

    @property
    def _row(self) -> int:
        return self.size("num_layers") * 2 * self.size("token_dim")
