"""Adapters written as Hugging Face PEFT saves them, and read back beside the weights that they adapt.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The keys are `base_model.model.<module>.<name>`,
with the names that the method's table gives for the disk; what layers share stands once, as `base_model.<name>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device, namespace, to_host
from peftarray.dtypes import parse_dtype
from peftarray.errors import ConfigError, MatchError, UnsupportedError
from peftarray.formats.adapters import Adapters, Ref, Site
from peftarray.formats.folder import write_folder
from peftarray.formats.peft import read
from peftarray.formats.peft_config import config_to_dict, read_config, unknown_fields
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.methods import TrainableTokensConfig
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.json_file import read_json
from peftarray.stores.safetensors import TensorInfo
from peftarray.targets import is_targeted

__all__ = ["OUT_PROJECTION", "TOKENS", "SavedAdapters", "load_adapters", "module_of", "save_adapters"]

_SHARED = "base_model."
_PREFIX = "base_model.model."
TOKENS = ".token_adapter"
"""What PEFT puts behind the name of an embedding of which some rows are trained beside another method."""
OUT_PROJECTION = ".base_layer.out_proj"
"""What it puts behind the name of an attention for its output projection."""


@dataclass(frozen=True)
class SavedAdapters:
    """What a folder holds.

    Attributes:
        config: the configuration, with its targets and patterns.
        adapters: path of a module, as PEFT's wrapped model has it -> its adapter.
        replace: tensor of the model -> its new values (`modules_to_save`, trained biases).
        extra: fields of the configuration's file that are not known here.
    """

    config: AdapterConfig
    adapters: Mapping[str, Adapter]
    replace: Mapping[str, Array] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def save_adapters(
    folder: str | Path,
    config: AdapterConfig,
    adapters: Mapping[str, Adapter],
    *,
    replace: Mapping[str, Array] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters of one configuration to a folder in PEFT's layout: PEFT, and `load_adapters`, read it.

    An adapter that is there already is replaced: at no time does the folder hold the configuration of one and the
    weights of another.

    Args:
        folder: made if it does not exist.
        config: with its targets and patterns; where it names no targets, the modules of `adapters` are written.
        adapters: module's name -> its adapter, with arrays of any library.
        replace: tensor of the model -> values that take its place.
        extra: further fields for the configuration's file.

    Raises:
        ConfigError: the configuration gives a module another method than its adapter has, or does not target it.
        MatchError: arrays are missing, or what layers share differs between them.
        OutputError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from peftarray import LoraConfig
        >>> config, weight = LoraConfig(r=2), np.ones((4, 3), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapters(folder, config, {"proj": config.init(weight, name="proj")})
        ...     load_adapters(folder, {"proj.weight": weight}).adapters["proj"].params["lora_A"].shape
        (2, 3)
    """
    config = _with_targets(config, adapters)
    tensors: dict[str, np.ndarray] = {}
    for module, adapter in adapters.items():
        _check(config, module, adapter)
        for key, array in _stored(module, adapter).items():
            values = to_host(array)
            if not _same(tensors.setdefault(key, values), values):
                message = f"{module}: {key} differs from that of another layer; layers must share one array"
                raise MatchError(message)
    for name, array in (replace or {}).items():
        module, _, local = name.rpartition(".")
        # In PEFT's wrapped model the tensors of an adapted module lie in the layer that is wrapped.
        tensors[f"{_PREFIX}{module}.base_layer.{local}" if module in adapters else _PREFIX + name] = to_host(array)
    written = dict(extra or {}) | config_to_dict(config) | {"inference_mode": True}
    write_folder(Path(folder), written, tensors)


def load_adapters(
    folder: str | Path,
    weights: Mapping[str, Array | tuple[int, ...]],
    *,
    config: AdapterConfig | None = None,
    layers: Mapping[str, Layer] | None = None,
    allow_unknown: bool = False,
) -> SavedAdapters:
    """The adapters in a folder that PEFT or `save_adapters` wrote, beside the weights that they adapt.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        weights: name of a tensor of the model -> its array, or its shape. The adapter's arrays get the library, device
            and dtype (at least float32) of the array; beside a shape they are NumPy's, in the dtype of the file.
        config: in place of the folder's own, such as one of a method that is not installed.
        layers: module's name -> its layer, for what weights do not say: that one is an embedding, or the stride of a
            convolution.
        allow_unknown: pass over fields of the configuration that are not known here and are set; they are kept.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    infos = [TensorInfo(name, _code(w), tuple(getattr(w, "shape", w)), 0, 0) for name, w in weights.items()]
    place = Path(folder)
    extra: dict[str, Any] = {}
    if config is None:
        config = read_config(place, allow_unknown=allow_unknown)
        extra = unknown_fields(config, read_json(place / "adapter_config.json"))
    found = read(folder, Checkpoint.described(infos, "the given weights"), config=config, layers=layers)
    adapters: dict[str, Adapter] = {}
    # What layers share is moved once; with its host array, so that no other gets its id.
    placed: dict[int, tuple[np.ndarray, Array]] = {}
    for site in found.sites:
        if any(ref.rows or ref.columns for ref in site.params.values()):
            message = f"{site.layer.name}: adapters of fused experts cannot be loaded one by one; merge them (pa.merge)"
            raise UnsupportedError(message)
        weight = weights[site.pieces[0].tensor]
        host = _params(site, found, weight)
        for values in host.values():
            if id(values) not in placed:
                placed[id(values)] = values, _beside(values, weight)
        params = {name: placed[id(values)][1] for name, values in host.items()}
        adapters[module_of(site)] = Adapter(site.method, site.layer, params)
    replace = {name: _beside(_read(found, ref), weights.get(name)) for name, ref in found.replace.items()}
    return SavedAdapters(found.config, adapters, replace, extra)


def _code(weight: Array | tuple[int, ...]) -> str:
    """The dtype of an array as a file would name it."""
    name = str(getattr(weight, "dtype", "float32")).rpartition(".")[2]
    return parse_dtype(name).code if "float" in name else "I64"


def _with_targets(config: AdapterConfig, adapters: Mapping[str, Adapter]) -> AdapterConfig:
    if not adapters:
        message = "there are no adapters to save; give at least one"
        raise ConfigError(message)
    if config.target_modules is not None or config.parameters_adapted():
        return config
    return dataclasses.replace(
        config, target_modules=sorted(name for name in adapters if not name.endswith((TOKENS, OUT_PROJECTION)))
    )


def _check(config: AdapterConfig, module: str, adapter: Adapter) -> None:
    """Refuse what would be read as something else."""
    tokens = module.endswith(TOKENS) and config.peft_type != TrainableTokensConfig.peft_type
    if tokens:
        rows = config.token_rows(module.removesuffix(TOKENS), is_input=True)
        method: AdapterConfig = TrainableTokensConfig(token_indices=list(rows)).at(module)
    else:
        # PEFT adds the update of an attention's output projection in two wrappers, the attention's and its own.
        target = module.removesuffix(OUT_PROJECTION)
        method = config.at(target) if target == module else config.at(target).applied_twice()
        targets = config.target_modules
        everything = isinstance(targets, str) and targets.lower() == "all-linear"
        if not everything and not is_targeted(target, config):
            message = f"{module} has an adapter, and target_modules is {targets!r}, which leaves it out; name it there"
            raise ConfigError(message)
    if adapter.config != method:
        message = f"{module}: {_difference(adapter.config, method)}; make it with config.init(weight, name={module!r})"
        raise ConfigError(message)
    stored = [name for name, row in method.params(adapter.layer).items() if row.stored]
    shapes = {name: tuple(adapter.params[name].shape) for name in stored if name in adapter.params}
    method.check_shapes(shapes, adapter.layer)


def _difference(ours: AdapterConfig, wanted: AdapterConfig) -> str:
    if type(ours) is not type(wanted):
        return f"the adapter is of {type(ours).__name__}, and the configuration a {type(wanted).__name__}"
    values = {item.name: (getattr(ours, item.name), getattr(wanted, item.name)) for item in dataclasses.fields(wanted)}
    name, (own, other) = next((name, pair) for name, pair in values.items() if pair[0] != pair[1])
    return f"{name} is {own!r} in the adapter and {other!r} in the configuration for this name"


def _stored(module: str, adapter: Adapter) -> dict[str, Array]:
    """Key -> array of what the file holds of an adapter."""
    return {
        f"{_SHARED}{row.shared}" if row.shared else f"{_PREFIX}{module}.{row.disk or name}": adapter.params[name]
        for name, row in adapter.config.params(adapter.layer).items()
        if row.stored
    }


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _params(site: Site, found: Adapters, weight: Array | tuple[int, ...]) -> dict[str, np.ndarray]:
    """The arrays of a site, in the dtype of its weight (at least float32), or else in that of the file."""
    codes = {found.tensors[ref.name].code for ref in site.params.values()}
    wide = _code(weight) == "F64" if hasattr(weight, "shape") else "F64" in codes

    def base() -> np.ndarray:
        if not hasattr(weight, "shape"):
            message = f"{site.layer.name}: {type(site.method).__name__} needs the weight itself, and got its shape"
            raise ConfigError(message)
        return site.layer.view(to_host(weight))

    return found.params(site, np.dtype(np.float64 if wide else np.float32), base)


def _read(found: Adapters, ref: Ref) -> np.ndarray:
    dtype = found.tensors[ref.name].dtype
    return ref.read(found.tensors, dtype.compute) if dtype.floating else found.tensors.read_stored(ref.name)


def _beside(values: np.ndarray, weight: Array | tuple[int, ...] | None) -> Array:
    """The same values in the library and on the device of an array; NumPy's where only a shape is known."""
    if not hasattr(weight, "shape"):
        return values
    return namespace(weight).asarray(values, device=device(weight))


def module_of(site: Site) -> str:
    """The module's path in PEFT's wrapped model, from the key of one of its tensors."""
    for name, row in site.method.params(site.layer).items():
        if row.shared is None and name in site.params:
            local = row.disk or name
            plain = name.replace("_", "_embedding_", 1)
            path = site.params[name].name.removeprefix(_PREFIX)
            for end in (local, name, f"{name}.weight", plain, f"{plain}.weight"):
                if path.endswith(f".{end}"):
                    return path.removesuffix(f".{end}")
    return site.layer.name
