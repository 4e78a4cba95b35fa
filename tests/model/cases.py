"""The models and methods that the tests of whole models run over.

A small language model of three layers as array code, with an embedding and an output layer that are not tied; its
weights are a mapping of names to arrays, by the names of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peftarray import (
    AdaLoraConfig,
    AdapterConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
)
from peftarray.arrays import namespace

LAYERS, VOCABULARY, WIDTH = 3, 11, 12
_TARGETS = {"target_modules": ["q_proj", "o_proj"]}

CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=2, **_TARGETS),
    "lora-embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "lora-pattern": LoraConfig(r=2, target_modules=r".*\.[02]\..*q_proj", rank_pattern={r"2\..*": 3}),
    "lora-layers": LoraConfig(r=2, layers_to_transform=[1], layers_pattern="layers", **_TARGETS),
    "lora-all-linear": LoraConfig(r=2, target_modules="all-linear", exclude_modules=["o_proj"]),
    "lora-saved": LoraConfig(r=2, modules_to_save=["lm_head"], bias="lora_only", **_TARGETS),
    "lora-tokens": LoraConfig(r=2, trainable_token_indices=[7, 1], bias="all", **_TARGETS),
    "lora-bias": LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]),
    "dora": LoraConfig(r=2, use_dora=True, **_TARGETS),
    "vera": VeraConfig(r=4, **_TARGETS),
    "ia3": IA3Config(feedforward_modules=["o_proj"], **_TARGETS),
    "adalora": AdaLoraConfig(init_r=3, total_step=100, **_TARGETS),
    "loha": LoHaConfig(r=2, **_TARGETS),
    "lokr": LoKrConfig(r=2, **_TARGETS),
    "oft": OFTConfig(oft_block_size=4, **_TARGETS),
    "boft": BOFTConfig(boft_block_size=4, **_TARGETS),
}


def base_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The model's weights."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape) * 0.5

    weights = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        weights |= {f"{name}.q_proj.weight": normal(WIDTH, WIDTH), f"{name}.q_proj.bias": normal(WIDTH)}
        weights |= {f"{name}.o_proj.weight": normal(WIDTH, WIDTH), f"{name}.norm.weight": normal(WIDTH)}
    return weights | {"lm_head.weight": normal(VOCABULARY, WIDTH)}


def run(weights: Mapping[str, Any], ids: Any) -> Any:
    """Logits, by operators and functions of the array API standard alone."""
    table = weights["model.embed_tokens.weight"]
    xp = namespace(table, *weights.values())
    x = xp.reshape(xp.take(table, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, WIDTH))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        q = x @ weights[f"{name}.q_proj.weight"].T + weights[f"{name}.q_proj.bias"]
        x = x + xp.tanh(q) @ weights[f"{name}.o_proj.weight"].mT * weights[f"{name}.norm.weight"]
    return x @ weights["lm_head.weight"].T


def moved(
    params: Mapping[str, Any], asarray: Callable[..., Any], to_numpy: Callable[[Any], np.ndarray]
) -> dict[str, Any]:
    """The parameters as if trained: each away from its first value."""
    draw = np.random.default_rng(7)
    found = {}
    for name, array in params.items():
        values = to_numpy(array)
        found[name] = asarray(values + 0.2 * draw.standard_normal(values.shape).astype(values.dtype))
    return found
