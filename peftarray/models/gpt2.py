"""GPT-2: learned positions, layer norms, and projections stored `(in, out)`.

    x = x + attention(layer_norm(x)),  x = x + W_proj gelu(W_fc layer_norm(x))

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from peftarray.arrays import Array, integers
from peftarray.autodiff.fused import attention, layer_norm
from peftarray.errors import ConfigError
from peftarray.models.activations import ACTIVATIONS
from peftarray.models.cache import Pair, extended
from peftarray.models.config import read_config, token
from peftarray.models.heads import join_heads, split_heads
from peftarray.models.linear import Weights, embedding, find, linear_transposed
from peftarray.models.model import Decoder, Tensor
from peftarray.prompts.adaption_prompt import GATE, PROMPT, gated_attention
from peftarray.settings import boolean, check_settings, number, one_of, optional, refused, setting, whole

__all__ = ["GPT2", "GPT2Config"]

_PROMPT, _GATE = (f"attn.{name}" for name in (PROMPT, GATE))
_TAILS = (
    *(
        f"{name}.{part}"
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for part in ("weight", "bias")
    ),
    _PROMPT,
    _GATE,
)


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """What a `config.json` says, in its own words."""

    model_type: str = setting("gpt2", one_of("gpt2"))
    vocab_size: int = setting(50257, whole(1))
    n_positions: int = setting(1024, whole(1))
    n_embd: int = setting(768, whole(1))
    n_layer: int = setting(12, whole(1))
    n_head: int = setting(12, whole(1))
    n_inner: int | None = setting(None, optional(whole(1)))
    activation_function: str = setting("gelu_new", one_of(*ACTIVATIONS))
    layer_norm_epsilon: float = setting(1e-5, number(0.0))
    scale_attn_weights: bool = setting(True, boolean)
    scale_attn_by_inverse_layer_idx: bool = setting(False, boolean)
    tie_word_embeddings: bool = setting(True, boolean)
    add_cross_attention: bool = refused(False, "this model reads one text")
    eos_token_id: int | tuple[int, ...] | None = setting(50256, token)
    pad_token_id: int | None = setting(None, optional(whole(0)))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.n_embd % self.n_head:
            message = f"n_embd is {self.n_embd}, which {self.n_head} heads do not divide"
            raise ConfigError(message)

    @property
    def depth(self) -> int:
        """Layers."""
        return self.n_layer

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees; None for all."""
        return None

    def scale(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class GPT2(Decoder):
    """GPT-2.

    Example:
        >>> from peftarray import models
        >>> model = models.create({"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2})
        >>> model(model.weights, [[1, 2, 3]]).shape
        (1, 3, 11)
    """

    config: GPT2Config
    usual_prefix: ClassVar[str] = "transformer."
    input_embedding: ClassVar[str] = "wte.weight"
    tails: ClassVar[tuple[str, ...]] = _TAILS

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GPT2Config:
        return read_config(GPT2Config, config)

    @classmethod
    def tensors(cls, config: GPT2Config) -> Iterator[Tensor]:
        width = config.n_embd
        inner = config.n_inner or 4 * width
        yield Tensor("wte.weight", (config.vocab_size, width))
        yield Tensor("wpe.weight", (config.n_positions, width))
        matrices = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
        for layer in range(config.n_layer):
            for name in ("ln_1", "ln_2"):
                yield Tensor(f"h.{layer}.{name}.weight", (width,))
                yield Tensor(f"h.{layer}.{name}.bias", (width,))
            for name, shape in matrices.items():
                yield Tensor(f"h.{layer}.{name}.weight", shape)
                yield Tensor(f"h.{layer}.{name}.bias", shape[1:])
        yield Tensor("ln_f.weight", (width,))
        yield Tensor("ln_f.bias", (width,))
        shared = cls.input_embedding if config.tie_word_embeddings else ""
        yield Tensor("lm_head.weight", (config.vocab_size, width), needed=False, bare=True, stand_in=shared)

    @property
    def limit(self) -> int:
        return self.config.n_positions

    def layer_name(self, number: int) -> str:
        return f"{self.prefix}h.{number}"

    def like(self, weights: Weights) -> Array:
        return find(weights, f"{self.prefix}ln_f.weight")

    def aids(self, places: np.ndarray, like: Array) -> tuple[Array, ...]:
        return ()

    @property
    def heads_of_keys(self) -> tuple[int, int]:
        return self.config.n_head, self.config.n_embd // self.config.n_head

    def embed(self, weights: Weights, ids: Array) -> Array:
        return embedding(weights, f"{self.prefix}wte", ids)

    def place(self, weights: Weights, x: Array, places: np.ndarray) -> Array:
        every = np.broadcast_to(places, (x.shape[0] // places.shape[-1], places.shape[-1])).reshape(-1)
        return x + embedding(weights, f"{self.prefix}wpe", integers(every, self.like(weights)))

    def finish(self, weights: Weights, x: Array) -> Array:
        return self._norm(weights, f"{self.prefix}ln_f", x)

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
        config = self.config
        mixed = linear_transposed(part, "attn.c_attn", self._norm(part, "ln_1", x))
        width = config.n_embd
        q, k, v = (split_heads(mixed[:, i * width : (i + 1) * width], batch, config.n_head) for i in range(3))
        k, v = extended(before, k, v)
        seen = attention(q, k, v, mask, causal=True, scale=config.scale(number))
        x = x + linear_transposed(part, "attn.c_proj", join_heads(seen))
        if _PROMPT in part:
            own = linear_transposed(part, "attn.c_attn", part[_PROMPT][0, ...])
            keys, values = (split_heads(own[:, i * width : (i + 1) * width], 1, config.n_head) for i in (1, 2))
            x = x + join_heads(gated_attention(q, keys, values, part[_GATE]))
        inner = ACTIVATIONS[config.activation_function](
            linear_transposed(part, "mlp.c_fc", self._norm(part, "ln_2", x))
        )
        return x + linear_transposed(part, "mlp.c_proj", inner), (k, v)

    def _norm(self, weights: Weights, name: str, x: Array) -> Array:
        eps = self.config.layer_norm_epsilon
        return layer_norm(x, find(weights, f"{name}.weight"), find(weights, f"{name}.bias"), eps=eps)
