"""Which models of transformers can read a soft prompt, and what a prompt must know of them."""

from __future__ import annotations

import inspect
from typing import Any

from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_prompt_attention import PromptedAttention
from peftarray.backends.torch_prompt_encoder import PromptArrays
from peftarray.backends.torch_saved import SavedModule
from torch import nn

from peftarray.errors import ConfigError, ShapeError, UnsupportedError
from peftarray.prompts import AdaptionPromptConfig, Host, PrefixTuningConfig, Prompt, VirtualTokens

__all__ = ["check_prompt", "embedding_of", "host_of"]


def check_prompt(module: nn.Module, config: Prompt, adapter_name: str) -> None:
    """Refuse what cannot have the prompt, before anything of it is changed.

    Raises:
        ConfigError: the name is none, or the model has an adapter or a prompt.
        ShapeError, UnsupportedError: the model cannot read the prompt.
    """
    if "." in adapter_name or not adapter_name:
        message = f"adapter_name is {adapter_name!r}; it must be a name without dots"
        raise ConfigError(message)
    if any(isinstance(part, (PromptArrays, PromptedAttention, AdaptedLayer, SavedModule)) for part in module.modules()):
        message = "the model has an adapter or a prompt already; unload or merge it first"
        raise ConfigError(message)
    decodes = bool(getattr(module.config, "is_encoder_decoder", False))
    if isinstance(config, AdaptionPromptConfig):
        for name in config.modules:
            PromptedAttention.check(module.get_submodule(name))
        return
    if isinstance(config, VirtualTokens) and config.submodules == 2 and not decodes:
        message = (
            f"{config.peft_type} with 2 submodules (task_type {config.task_type}) is for an encoder with a decoder, "
            f"and {type(module).__name__} is none"
        )
        raise UnsupportedError(message)
    width = embedding_of(module).weight.shape[1]
    if isinstance(config, PrefixTuningConfig):
        _check_prefix(module, config)
    elif isinstance(config, VirtualTokens) and config.token_dim != width:
        message = (
            f"{type(config).__name__}.token_dim is {config.token_dim}; the rows of this model's words are {width} wide"
        )
        raise ShapeError(message)


def _check_prefix(module: Any, config: PrefixTuningConfig) -> None:
    """Refuse a model that reads no keys and values from before, or other ones."""
    inner = getattr(module, getattr(module, "base_model_prefix", ""), module)
    for part in (module, inner):
        names = inspect.signature(part.forward).parameters
        passes = part is not inner and any(row.kind is row.VAR_KEYWORD for row in names.values())
        if "past_key_values" not in names and not passes:
            message = f"{type(part).__name__} takes no past_key_values, so a prefix has no effect on it"
            raise UnsupportedError(message)
    width = getattr(module.config, "d_kv", None)
    if width is not None and width * config.size("num_attention_heads") != config.token_dim:
        message = (
            f"PrefixTuningConfig.token_dim is {config.token_dim} for {config.num_attention_heads} heads; those of this "
            f"model are {width} wide each: set token_dim to {width * config.size('num_attention_heads')}"
        )
        raise ShapeError(message)


def host_of(module: Any) -> Host:
    """The sizes of a model of transformers.

    Raises:
        ConfigError: it is none.
    """
    config: Any = getattr(module, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        message = (
            f"a soft prompt goes before what a model of transformers reads, and {type(module).__name__} is none; give "
            "your own module what config.weights(params) makes"
        )
        raise ConfigError(message)
    # Sizes that have another name on disk have these in memory.
    known = {name: getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    facts: dict[str, Any] = config.to_dict()
    if "text_config" not in facts:
        facts |= {name: size for name, size in known.items() if size is not None}
    return Host.read(facts, [name for name, _ in module.named_parameters()])


def embedding_of(module: Any) -> Any:
    """The layer that makes the rows of words.

    Raises:
        UnsupportedError: it is not loaded.
    """
    found = module.get_input_embeddings()
    if found.weight.is_meta:
        message = "the model is on the meta device; load its weights first"
        raise UnsupportedError(message)
    return found
