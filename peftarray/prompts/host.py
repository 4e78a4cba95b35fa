"""What a prompt must know of the model that it is for: a few sizes, and the names of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from peftarray.errors import ConfigError

__all__ = ["Host"]

# The names that the configurations of models give to one size, as PEFT looks for them.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


@dataclass(frozen=True)
class Host:
    """A model's sizes.

    Attributes:
        model_type: as its `config.json` says.
        width: of a token's row.
        layers: how many.
        heads: of the queries.
        groups: heads of the keys and values; None where the configuration does not say.
        head_width: channels of a head.
        names: of its weights.

    Example:
        >>> Host.read({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
        Host(model_type='', width=16, layers=2, heads=4, groups=2, head_width=4, names=())
    """

    model_type: str
    width: int
    layers: int
    heads: int
    groups: int | None
    head_width: int
    names: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any], names: Iterable[str] = ()) -> Self:
        """From what a `config.json` holds; of a model of images and text, from its `text_config`.

        Raises:
            ConfigError: it lacks a size.
        """
        config = config.get("text_config") or config
        width, layers, heads = (_first(config, keys) for keys in (_WIDTH, _LAYERS, _HEADS))
        groups = (config["num_key_value_heads"] or heads) if "num_key_value_heads" in config else None
        head_width = config.get("head_dim") or width // heads
        return cls(str(config.get("model_type") or ""), width, layers, heads, groups, head_width, tuple(names))


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        if type(config.get(key)) is int and config[key] > 0:
            return int(config[key])
    message = f"the model's configuration has none of {', '.join(keys)}; set the prompt's sizes yourself"
    raise ConfigError(message)
