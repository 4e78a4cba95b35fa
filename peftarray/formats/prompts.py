"""Soft prompts written as Hugging Face PEFT saves them, and read back.

The folder is that of other adapters. Virtual tokens stand in it under the names of the prompt's table, without a
prefix; what an encoder made is saved, and the encoder is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.arrays import Array, Params, constant, to_host, wide
from peftarray.errors import ConfigError, MatchError
from peftarray.formats.folder import write_folder
from peftarray.formats.peft import open_weights
from peftarray.formats.peft_config import config_to_dict, known_values, unknown_fields
from peftarray.prompts import PROMPTS, Host, Prompt, VirtualTokens
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.json_file import read_json
from peftarray.targets import is_saved

__all__ = ["SavedPrompt", "holds_prompt", "load_prompt", "read_prompt_config", "save_prompt", "source_prompt"]

_PREFIX = "base_model."


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """What a folder holds.

    Attributes:
        config: the prompt.
        params: its stored arrays.
        replace: tensor of the model -> its new values (`modules_to_save`).
        extra: fields of the configuration's file that are not known here.
    """

    config: Prompt
    params: Mapping[str, Array]
    replace: Mapping[str, Array] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def holds_prompt(folder: str | Path) -> bool:
    """Whether the configuration in a folder is that of a soft prompt."""
    file = Path(folder) / "adapter_config.json"
    return file.is_file() and read_json(file).get("peft_type") in PROMPTS


def save_prompt(
    folder: str | Path,
    config: Prompt,
    params: Params,
    *,
    replace: Mapping[str, Array] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a prompt to a folder in PEFT's layout: PEFT, and `load_prompt`, read it.

    Args:
        folder: made if it does not exist; a prompt that is there is replaced.
        config: with its sizes.
        params: trained arrays or stored ones, of any library.
        replace: tensor of the model -> values that take its place.
        extra: further fields for the configuration's file.

    Raises:
        MatchError, ShapeError: the arrays are not those of the configuration.
        OutputError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from peftarray.prompts import PromptTuningConfig
        >>> config = PromptTuningConfig(num_virtual_tokens=2, token_dim=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_prompt(folder, config, config.init_params(np.ones(1, np.float32)))
        ...     load_prompt(folder).params["prompt_embeddings"].shape
        (2, 3)
    """
    stored = {name: to_host(array) for name, array in config.to_store(params).items()}
    config.check_shapes({name: values.shape for name, values in stored.items()}, str(folder))
    disk = {name: row.disk or name for name, row in config.stored().items()}
    written = dict(extra or {}) | config_to_dict(config) | {"inference_mode": True}
    tensors = {disk[name]: values for name, values in stored.items()}
    tensors |= {_PREFIX + name: to_host(array) for name, array in (replace or {}).items()}
    write_folder(Path(folder), written, tensors)


def load_prompt(
    folder: str | Path, *, host: Host | None = None, like: Array | None = None, allow_unknown: bool = False
) -> SavedPrompt:
    """The prompt in a folder that PEFT or `save_prompt` wrote.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        host: the model that it is for; without it the folder must say all sizes, which it does but for LLaMA-Adapter.
        like: an array of the model: the prompt's get its library, device and dtype, at least float32. NumPy's if None.
        allow_unknown: pass over fields of the configuration that are not known here.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    place = Path(folder)
    config = read_prompt_config(place, allow_unknown=allow_unknown)
    if host is not None:
        config = config.for_model(host)
    tensors = open_weights(place)
    here = {row.disk or name: name for name, row in config.stored().items()}
    others = [key for key in tensors if key not in here]
    for key in others:
        known = isinstance(config, VirtualTokens) and is_saved(key.removeprefix(_PREFIX), config)
        if not known or not key.startswith(_PREFIX):
            message = (
                f"{place}: {key} is no array of {type(config).__name__} with this configuration, whose are "
                f"{', '.join(list(here)[:4])}, and no module in modules_to_save"
            )
            raise MatchError(message)
    config.check_shapes({name: tensors[key].shape for key, name in here.items() if key in tensors}, str(place))
    params = {name: _beside(tensors.read(key), like) for key, name in here.items()}
    replace = {key.removeprefix(_PREFIX): _beside(tensors.read(key), like) for key in others}
    return SavedPrompt(config, params, replace, unknown_fields(config, read_json(place / "adapter_config.json")))


def source_prompt(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a `.safetensors` file, for a prompt that starts from a trained one."""
    tensors = Checkpoint.open(path)
    return {name: tensors.read(name) for name in tensors}


def read_prompt_config(folder: Path, *, allow_unknown: bool = False) -> Prompt:
    """The configuration of the prompt in a folder.

    Raises:
        ConfigError: there is none, or a field is not as it must be.
    """
    file = folder / "adapter_config.json"
    data = read_json(file) if file.is_file() else {}
    kind = data.get("peft_type")
    if kind not in PROMPTS:
        message = (
            f"{file}: peft_type is {str(kind)[:80]!r}; the soft prompts known here are {', '.join(sorted(PROMPTS))}"
        )
        raise ConfigError(message)
    return PROMPTS[kind](**known_values(PROMPTS[kind], data, str(file), allow_unknown=allow_unknown))


def _beside(values: np.ndarray, like: Array | None) -> Array:
    return values if like is None else constant(values, wide(like))
