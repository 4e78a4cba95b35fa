"""Llama and the models that are built as it is: Mistral, Qwen2 and Qwen3, SmolLM and SmolLM3.

    x = x + attention(rms_norm(x)),  x = x + W_down (silu(W_gate n) * W_up n) with n = rms_norm(x)

Sources: Touvron et al., LLaMA, 2023, section 2.2, arXiv:2302.13971; Jiang et al., Mistral 7B, 2023, section 2 (sliding
window), arXiv:2310.06825; Yang et al., Qwen2, 2024, section 2.2 (biases), arXiv:2407.10671; Yang et al., Qwen3, 2025,
section 2 (norms of queries and keys), arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from peftarray.arrays import Array, constant
from peftarray.autodiff.fused import attention, rms_norm, rope, silu_mul
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.models.cache import Pair, extended
from peftarray.models.config import read_config, token
from peftarray.models.heads import join_heads, split_heads
from peftarray.models.linear import Weights, embedding, find, linear
from peftarray.models.model import Decoder, Tensor
from peftarray.models.rotary import Rotary
from peftarray.prompts.adaption_prompt import GATE, PROMPT, gated_attention
from peftarray.settings import Rule, boolean, check_settings, number, one_of, optional, setting, whole

__all__ = ["Llama", "LlamaConfig"]

_count = optional(whole(1))


def _each(*values: Any) -> Rule:
    """A list with one of these values for each layer, or None."""
    words = "a list of " + " and ".join(map(repr, values))
    return optional(Rule(lambda given: isinstance(given, tuple) and all(item in values for item in given), words))


# What the models of a type take for granted, where their file is silent.
_USUAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False, "head_dim": 128},
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
}
_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_PROMPT, _GATE = (f"self_attn.{name}" for name in (PROMPT, GATE))
_TAILS = (
    *_NORMS,
    *_HEAD_NORMS,
    _PROMPT,
    _GATE,
    *(f"{name}.{part}" for name in _PROJECTIONS for part in ("weight", "bias")),
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What a `config.json` says, in its own words.

    Attributes:
        rotary: how positions turn the heads; from `rope_parameters`, or `rope_theta` and `rope_scaling`.
    """

    model_type: str = setting("llama", one_of(*_USUAL))
    vocab_size: int = setting(32000, whole(1))
    hidden_size: int = setting(4096, whole(1))
    intermediate_size: int = setting(11008, whole(1))
    num_hidden_layers: int = setting(32, whole(1))
    num_attention_heads: int = setting(32, whole(1))
    num_key_value_heads: int | None = setting(None, _count)
    head_dim: int | None = setting(None, _count)
    hidden_act: str = "silu"
    rms_norm_eps: float = setting(1e-6, number(0.0))
    tie_word_embeddings: bool = setting(False, boolean)
    attention_bias: bool = setting(False, boolean)
    mlp_bias: bool = setting(False, boolean)
    sliding_window: int | None = setting(None, _count)
    use_sliding_window: bool = setting(True, boolean)
    max_window_layers: int = setting(28, whole(0))
    layer_types: tuple[str, ...] | None = setting(None, _each("full_attention", "sliding_attention"))
    no_rope_layers: tuple[int, ...] | None = setting(None, _each(0, 1))
    no_rope_layer_interval: int | None = setting(None, _count)
    eos_token_id: int | tuple[int, ...] | None = setting(None, token)
    pad_token_id: int | None = setting(None, optional(whole(0)))
    rotary: Rotary

    def __post_init__(self) -> None:
        check_settings(self)
        if self.hidden_act != "silu":
            message = f"hidden_act is {self.hidden_act!r}; models of type {self.model_type} are known with 'silu' alone"
            raise UnsupportedError(message)
        if self.num_attention_heads % self.groups:
            message = (
                f"{self.num_attention_heads} attention heads cannot share {self.groups} key-value heads; the second "
                "must divide the first"
            )
            raise ConfigError(message)
        for name in ("layer_types", "no_rope_layers"):
            given = getattr(self, name)
            if given is not None and len(given) < self.num_hidden_layers:
                message = f"{name} has {len(given)} entries; there are {self.num_hidden_layers} layers"
                raise ConfigError(message)

    @property
    def depth(self) -> int:
        """Layers."""
        return self.num_hidden_layers

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees; None for all."""
        if self.model_type in ("llama", "mistral"):
            return self.sliding_window if self.model_type == "mistral" else None
        if not self.use_sliding_window:
            return None
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
        slides = not self.turns(layer) if self.model_type == "smollm3" else layer >= self.max_window_layers
        return self.sliding_window if slides else None

    def turns(self, layer: int) -> bool:
        """Whether this layer knows positions."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return self.no_rope_layer_interval is None or (layer + 1) % self.no_rope_layer_interval != 0

    def has_bias(self, projection: str) -> bool:
        """Whether a projection of every layer, such as `self_attn.q_proj`, has a bias."""
        if self.model_type == "qwen2":
            return projection in _PROJECTIONS[:3]
        return self.mlp_bias if projection.startswith("mlp") else self.attention_bias


class Llama(Decoder):
    """A model of the Llama family.

    Example:
        >>> from peftarray import models
        >>> model = models.create({"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
        ...                        "num_hidden_layers": 2, "num_attention_heads": 2})
        >>> model(model.weights, [[1, 2, 3]]).shape
        (1, 3, 11)
    """

    config: LlamaConfig
    usual_prefix: ClassVar[str] = "model."
    input_embedding: ClassVar[str] = "embed_tokens.weight"
    tails: ClassVar[tuple[str, ...]] = _TAILS

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LlamaConfig:
        data = _USUAL.get(str(config.get("model_type")), {}) | dict(config)
        hidden, heads = data.get("hidden_size", 4096), data.get("num_attention_heads", 32)
        usual = hidden // heads if all(map(whole(1).allows, (hidden, heads))) else 128
        width = data.get("head_dim") or usual
        rotary = Rotary.read(data, width) if whole(1).allows(width) else None  # which is refused below
        return read_config(LlamaConfig, data | {"rotary": rotary})

    @classmethod
    def tensors(cls, config: LlamaConfig) -> Iterator[Tensor]:
        vocabulary, hidden, inner = config.vocab_size, config.hidden_size, config.intermediate_size
        queries, keys = config.num_attention_heads * config.width, config.groups * config.width
        shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        yield Tensor("embed_tokens.weight", (vocabulary, hidden))
        for layer in range(config.num_hidden_layers):
            for name, shape in zip(_PROJECTIONS, shapes, strict=True):
                yield Tensor(f"layers.{layer}.{name}.weight", shape)
                if config.has_bias(name):
                    yield Tensor(f"layers.{layer}.{name}.bias", shape[:1])
            for name in _NORMS:
                yield Tensor(f"layers.{layer}.{name}", (hidden,))
            if config.model_type == "qwen3":
                for name in _HEAD_NORMS:
                    yield Tensor(f"layers.{layer}.{name}", (config.width,))
        yield Tensor("norm.weight", (hidden,))
        shared = cls.input_embedding if config.tie_word_embeddings else ""
        yield Tensor("lm_head.weight", (vocabulary, hidden), needed=False, bare=True, stand_in=shared)

    @property
    def limit(self) -> int:
        return self.config.rotary.limit

    def layer_name(self, number: int) -> str:
        return f"{self.prefix}layers.{number}"

    def like(self, weights: Weights) -> Array:
        return find(weights, f"{self.prefix}norm.weight")

    def aids(self, places: np.ndarray, like: Array) -> tuple[Array, ...]:
        """Cosines and sines; one row of them serves all heads of a sample."""
        return tuple(constant(part, like) for part in self.config.rotary.table(places[..., None, :]))

    @property
    def heads_of_keys(self) -> tuple[int, int]:
        return self.config.groups, self.config.width

    def embed(self, weights: Weights, ids: Array) -> Array:
        return embedding(weights, f"{self.prefix}embed_tokens", ids)

    def finish(self, weights: Weights, x: Array) -> Array:
        return rms_norm(x, find(weights, f"{self.prefix}norm.weight"), eps=self.config.rms_norm_eps)

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
        eps = self.config.rms_norm_eps
        normal = rms_norm(x, part["input_layernorm.weight"], eps=eps)
        mixed, pair = self._attention(part, normal, batch, mask, aids if self.config.turns(number) else (), before)
        x = x + mixed
        normal = rms_norm(x, part["post_attention_layernorm.weight"], eps=eps)
        gated = silu_mul(linear(part, "mlp.gate_proj", normal), linear(part, "mlp.up_proj", normal))
        return x + linear(part, "mlp.down_proj", gated), pair

    def _attention(
        self, part: Weights, x: Array, batch: int, mask: Array | None, turn: tuple[Array, ...], before: Pair | None
    ) -> tuple[Array, Pair]:
        config = self.config
        q, k, v = (
            split_heads(linear(part, f"self_attn.{name}_proj", x), batch, heads)
            for name, heads in (("q", config.num_attention_heads), ("k", config.groups), ("v", config.groups))
        )
        if "self_attn.q_norm.weight" in part:
            q, k = (
                rms_norm(h, part[name], eps=config.rms_norm_eps) for h, name in zip((q, k), _HEAD_NORMS, strict=True)
            )
        if turn:
            q, k = rope(q, *turn), rope(k, *turn)
        k, v = extended(before, k, v)
        seen = attention(q, k, v, mask, causal=True)
        if _PROMPT in part:
            keys, values = (
                split_heads(linear(part, f"self_attn.{name}_proj", part[_PROMPT][0, ...]), 1, config.groups)
                for name in "kv"
            )
            seen = seen + gated_attention(q, keys, values, part[_GATE])
        return linear(part, "self_attn.o_proj", join_heads(seen)), (k, v)
