"""A base as far as a LoRA adapter's own tensors tell of it: the names and shapes of the layers that it is on.

The factors of LoRA have a side for each axis of the layer's weight. Those of other methods do not, or not for every
kind of layer.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from peftarray.errors import UnsupportedError
from peftarray.formats.names import WRAPPERS
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.methods import LoraConfig
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo

__all__ = ["described_base"]

_PREFIX = "base_model.model."
_TOKENS = "trainable_tokens_delta"
_OWN = ("lora_", _TOKENS)


def described_base(folder: Path, config: AdapterConfig, tensors: Checkpoint) -> tuple[Checkpoint, dict[str, Layer]]:
    """A checkpoint without values for `peftarray.formats.peft.read`, and the layers that names do not tell.

    Args:
        folder: of the adapter, for messages.
        config: the adapter's.
        tensors: the adapter's.

    Raises:
        UnsupportedError: the tensors do not tell the shapes of the layers.
    """
    if not isinstance(config, LoraConfig) or config.use_bdlora or config.kasa_config:
        what = type(config).__name__
        variant = "" if not isinstance(config, LoraConfig) else " with use_bdlora or kasa_config"
        message = (
            f"{folder}: the tensors of {what}{variant} do not tell the shapes of the layers; give the base that it was "
            "trained on (base=, or --base)"
        )
        raise UnsupportedError(message)
    shapes: dict[str, tuple[int, ...]] = {}
    groups: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, info in tensors.items():
        words = key.removeprefix(_PREFIX).split(".")
        place = next((i for i, word in enumerate(words) if word.startswith(_OWN)), len(words))
        path = ".".join(words[:place])
        clean = ".".join(word for word in words[:place] if word not in WRAPPERS)
        if place == len(words):
            shapes[clean] = info.shape
        elif words[place] == _TOKENS:
            module = path.removesuffix(".token_adapter")
            rows = config.token_rows(module, is_input=True) or (0,)
            shapes.setdefault(f"{clean}.weight", (max(rows) + 1, *info.shape[1:]))
        else:
            groups[path][".".join(words[place:])] = info.shape
    layers = {}
    for path, group in groups.items():
        layer = _layer(path, group, config)
        attention = f"{path}.base_layer.out_proj" in groups
        clean = ".".join(word for word in path.split(".") if word not in WRAPPERS)
        shapes[f"{clean}.in_proj_weight" if attention else f"{clean}.weight"] = layer.stored_shape
        if "lora_B.bias" in group:
            shapes[f"{clean}.bias"] = (layer.out,)
        if not attention:
            layers[clean] = layer
    infos = [TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()]
    return Checkpoint.described(infos, f"what {folder} tells of its base"), layers


def _layer(path: str, group: dict[str, tuple[int, ...]], config: AdapterConfig) -> Layer:
    """The layer that these factors are for; where they are no factors, one that they will not fit."""
    name = ".".join(word for word in path.split(".") if word not in WRAPPERS)
    if "lora_embedding_A" in group or "lora_embedding_B" in group:
        down, up = group.get("lora_embedding_A", ()), group.get("lora_embedding_B", ())
        return Layer(name, "embedding", (*(up[:1] or (1,)), *(down[1:2] or (1,))), transposed=True)
    down, up = group.get("lora_A.weight", ()), group.get("lora_B.weight", ())
    if len(down) > 2:
        return Layer(name, "conv", (*(up[:1] or (1,)), *down[1:]))
    shape = (*(up[:1] or (1,)), *(down[1:2] or (1,)))
    return Layer(name, "linear", shape, transposed=config.stored_in_out())
