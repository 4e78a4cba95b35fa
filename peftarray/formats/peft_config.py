"""`adapter_config.json`: which method, with which hyper-parameters; nothing that changes the result is ever ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftarray.errors import ConfigError, UnsupportedError, nearest
from peftarray.method import AdapterConfig
from peftarray.methods import METHODS
from peftarray.stores.json_file import read_json

if TYPE_CHECKING:
    from peftarray.prompts.prompt import Prompt

__all__ = ["config_from_dict", "config_to_dict", "known_values", "read_config", "unknown_fields"]

# The release of PEFT whose layout and formulas these are.
_PEFT_VERSION = "0.21.2"
# Fields of this package's base class that some of PEFT's classes lack; PEFT warns of those that it does not know.
_NOT_IN_ALL = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
# Fields of PEFT's that concern neither the weights nor where they go.
_INERT = frozenset({"peft_type", "runtime_config", "custom_modules", "modules_to_tie", "target_modules_to_tie"})
# PEFT 0.21's types that are known to have no merged weight, with the reason.
_NOT_MERGEABLE = {
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "CPT",
            "CARTRIDGE",
            "ADAPTION_PROMPT",
        ),
        "a soft prompt changes the input and not the weights",
    ),
    **dict.fromkeys(("LILY", "POLY", "XLORA", "SHADOW"), "its update depends on the input, so no merged weight exists"),
}


def read_config(folder: Path, *, allow_unknown: bool = False) -> AdapterConfig:
    """The configuration in a folder's `adapter_config.json`."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        message = (
            f"{folder} has no adapter_config.json; give the folder that save_pretrained wrote (with "
            "adapter_config.json and adapter_model.safetensors)"
        )
        raise ConfigError(message)
    return config_from_dict(read_json(file), str(file), allow_unknown=allow_unknown)


def config_from_dict(
    data: dict[str, Any], where: str, *, allow_unknown: bool = False, method: type[AdapterConfig] | None = None
) -> AdapterConfig:
    """The configuration that a JSON object describes.

    Args:
        data: the object.
        where: its origin, for messages.
        allow_unknown: pass over fields that are not known here and are set.
        method: its class; the one that `peft_type` names if None.

    Raises:
        ConfigError: `peft_type` or a field is unknown, or a value is not allowed.
        UnsupportedError: the method or a field cannot be carried out.

    Example:
        >>> config_from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "example").r
        4
    """
    kind = data.get("peft_type")
    if method is None and (not isinstance(kind, str) or kind not in METHODS):
        if isinstance(kind, str) and kind in _NOT_MERGEABLE:
            message = f"{where}: peft_type {kind} cannot be merged: {_NOT_MERGEABLE[kind]}"
            raise UnsupportedError(message)
        message = f"{where}: peft_type is {str(kind)[:80]!r}; known are {', '.join(sorted(METHODS))}"
        raise ConfigError(message)
    method = method or METHODS[str(kind)]
    return method(**known_values(method, data, where, allow_unknown=allow_unknown))


def known_values(method: type[Any], data: Mapping[str, Any], where: str, *, allow_unknown: bool) -> dict[str, Any]:
    """What a JSON object says of the fields of a dataclass; arguments as for `config_from_dict`.

    Raises:
        ConfigError: it sets a field that is unknown.
    """
    known = {field.name for field in dataclasses.fields(method)}
    unknown = [name for name, value in data.items() if name not in known | _INERT and _is_set(value)]
    if unknown and not allow_unknown:
        message = (
            f"{where}: {method.__name__} has no field {unknown[0]!r} here{nearest(unknown[0], known)}, and it is "
            f"set to {str(data[unknown[0]])[:80]!r}, which may change the result; remove it if it does not, or "
            "allow it (--allow-unmatched)"
        )
        raise ConfigError(message)
    values = {name: value for name, value in data.items() if name in known}
    for name in ("rank_pattern", "alpha_pattern"):
        # PEFT writes null where older releases wrote {}.
        if name in values and values[name] is None:
            del values[name]
    return values


def unknown_fields(config: AdapterConfig | Prompt, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON object says beyond what is written of its configuration: what has no effect here, or was allowed.

    Example:
        >>> from peftarray import LoraConfig
        >>> unknown_fields(LoraConfig(r=4), {"peft_type": "LORA", "r": 4, "runtime_config": {"a": 1}})
        {'runtime_config': {'a': 1}}
    """
    known = config_to_dict(config)
    return {name: value for name, value in data.items() if name not in known}


def config_to_dict(config: AdapterConfig | Prompt) -> dict[str, Any]:
    """The JSON object that describes a configuration: the inverse of `config_from_dict`.

    Example:
        >>> from peftarray import LoraConfig
        >>> config_to_dict(LoraConfig(r=4))["peft_type"]
        'LORA'
    """
    own = [field.name for field in dataclasses.fields(config) if not field.metadata.get("derived")]
    values = {name: _plain(getattr(config, name)) for name in own}
    values = {name: value for name, value in values.items() if value is not None or name not in _NOT_IN_ALL}
    # PEFT reads a missing version as its oldest, and gives OFT's older formula a warning.
    version = config.peft_version or _PEFT_VERSION
    return values | {"peft_type": config.peft_type, "peft_version": version}


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_set(value: object) -> bool:
    return value not in (None, False, 0, "", [], {})
